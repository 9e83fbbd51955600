"""Scores the predictions of a run, as its benchmark's owners do. What a score needs is in the
predictions: they can be scored again without the benchmark's files.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flamingo_jax.evaluation.metrics.exact_match import exact_match
from flamingo_jax.evaluation.metrics.vqa_accuracy import VARIANTS, score_answers
from flamingo_jax.evaluation.protocol.benchmark import Prediction
from flamingo_jax.evaluation.scoring.captions import score_captions
from flamingo_jax.evaluation.scoring.report import ScoreReport
from flamingo_jax.evaluation.statistics import mean_estimate

PredictionScorer = Callable[..., ScoreReport]
"""(predictions, **options) -> scores. The first metric is the one that reports show."""


def score_predictions(
    scorer: str, predictions: Sequence[Prediction], options: Mapping[str, Any] | None = None
) -> ScoreReport:
    """Scores predictions by the scorer of this name; the report's items are in their order."""
    return SCORERS[scorer](predictions, **(options or {}))


def captions(predictions: Sequence[Prediction]) -> ScoreReport:
    """Scores captions by CIDEr-D, BLEU and ROUGE-L, as pycocoevalcap does."""
    metrics, items = score_captions(
        [one.text for one in predictions], [one.answers for one in predictions]
    )
    about = {"tokenizer": "Penn Treebank, as pycocoevalcap's"}
    return ScoreReport(metrics, _with_ids(predictions, items), about)


def vqa(predictions: Sequence[Prediction], *, variant: str = "official") -> ScoreReport:
    """Scores answers by VQA accuracy, with errors over images."""
    rules = VARIANTS[variant]
    scores = [score_answers(one.text, list(one.answers), rules, None) for one in predictions]
    about = {"variant": variant, "rules": rules.about, **_by_type(predictions, scores)}
    return _mean("accuracy", predictions, scores, about)


def exact(predictions: Sequence[Prediction]) -> ScoreReport:
    """Scores answers by exact match."""
    scores = [exact_match(one.text, one.answers) for one in predictions]
    return _mean("accuracy", predictions, scores, _by_type(predictions, scores))


def top_k(predictions: Sequence[Prediction]) -> ScoreReport:
    """Scores rankings by whether a true class is the first, or among the first five."""
    ranks = np.array([one.rank for one in predictions])
    clusters = _clusters(predictions)
    first, five = (ranks < 1).astype(float), (ranks < 5).astype(float)
    metrics = {
        "top-1": mean_estimate(first, clusters),
        "top-5": mean_estimate(five, clusters),
        "mean of top-1 and top-5": mean_estimate((first + five) / 2, clusters),
    }
    items = [{"top-1": a, "top-5": b} for a, b in zip(first.tolist(), five.tolist(), strict=True)]
    return ScoreReport(metrics, _with_ids(predictions, items), {})


SCORERS: dict[str, PredictionScorer] = {
    "captions": captions,
    "vqa": vqa,
    "exact": exact,
    "top_k": top_k,
}


def _mean(
    name: str, predictions: Sequence[Prediction], scores: Sequence[float], about: dict[str, Any]
) -> ScoreReport:
    items = _with_ids(predictions, [{name: score} for score in scores])
    return ScoreReport({name: mean_estimate(scores, _clusters(predictions))}, items, about)


def _clusters(predictions: Sequence[Prediction]) -> list[str]:
    return [one.cluster or one.id for one in predictions]


def _by_type(predictions: Sequence[Prediction], scores: Sequence[float]) -> dict[str, Any]:
    """Returns the mean score of each type of question, if they have types."""
    types: dict[str, list[float]] = defaultdict(list)
    for one, score in zip(predictions, scores, strict=True):
        if one.question_type:
            types[one.question_type].append(score)
    means = {name: sum(some) / len(some) for name, some in sorted(types.items())}
    return {"by_type": means} if means else {}


def _with_ids(
    predictions: Sequence[Prediction], items: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    return [{"id": one.id, **item} for one, item in zip(predictions, items, strict=True)]
