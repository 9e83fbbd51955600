"""Scores the predictions of a run, as its benchmark's owners do. What a score needs is in the
predictions: they can be scored again without the benchmark's files.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flamingo_jax.evaluation.metrics.exact_match import exact_match
from flamingo_jax.evaluation.metrics.vqa_accuracy import ivqa_accuracy, vqa_accuracy
from flamingo_jax.evaluation.protocol.benchmark import Prediction
from flamingo_jax.evaluation.scoring import ranked_predictions
from flamingo_jax.evaluation.scoring.captions import score_captions
from flamingo_jax.evaluation.scoring.questions import (
    Annotated,
    score_questions,
    stem_predictions,
)
from flamingo_jax.evaluation.scoring.report import ScoreReport
from flamingo_jax.evaluation.scoring.wups import VideoAnswer, score_video_answers
from flamingo_jax.evaluation.statistics import mean_estimate
from flamingo_jax.evaluation.words import okvqa_stems
from flamingo_jax.evaluation.words.wordnet import WordNet, read_wordnet

PredictionScorer = Callable[..., ScoreReport]
"""(predictions, **options) -> scores. The first metric is the one that reports show."""


def score_predictions(
    scorer: str,
    predictions: Sequence[Prediction],
    options: Mapping[str, Any] | None = None,
    *,
    wordnet: str = "",
) -> ScoreReport:
    """Scores predictions by the scorer of this name; the report's items are in their order, but
    for mWAP, whose items are the actions.

    Predictions without ground truths, such as of a test split that the owners score, have a
    report without metrics.

    Args:
      options: of the metric.
      wordnet: folder of WordNet 3.0's files, for scorers that read them (`READ_WORDNET`); by
        default one that is found. It is no option: no score depends on where the files lie.

    Raises: UserError without WordNet.
    """
    if not any(one.answers or one.ranking for one in predictions):
        return ScoreReport({}, _with_ids(predictions, [{}] * len(predictions)), {"unscored": True})
    read = {"wordnet": read_wordnet(wordnet)} if scorer in READ_WORDNET else {}
    return SCORERS[scorer](predictions, **(options or {}), **read)


def check_scorer(scorer: str, *, wordnet: str = "") -> None:
    """Checks that the files that a scorer reads are there, before predictions are made.

    Raises: UserError where they are not.
    """
    if scorer in READ_WORDNET:
        read_wordnet(wordnet)


def captions(
    predictions: Sequence[Prediction],
    *,
    meteor: bool = False,
    by_type: bool = False,
    exact: bool = False,
) -> ScoreReport:
    """Scores captions by CIDEr-D, BLEU and ROUGE-L, as pycocoevalcap does.

    Args:
      meteor: whether to add METEOR, which needs Java.
      by_type: whether to add the CIDEr-D of each type among the references of the type.
      exact: whether to add the share that equals a reference, as synthetic data allows.
    """
    metrics, items = score_captions(
        [one.text for one in predictions],
        [one.answers for one in predictions],
        with_meteor=meteor,
        clusters=_clusters(predictions),
        types=[one.question_type for one in predictions] if by_type else (),
    )
    if exact:
        equal = [exact_match(one.text, one.answers) for one in predictions]
        metrics["exact match"] = mean_estimate(equal, _clusters(predictions))
        items = [item | {"exact match": x} for item, x in zip(items, equal, strict=True)]
    about = {"tokenizer": "Penn Treebank, as pycocoevalcap's"}
    return ScoreReport(metrics, _with_ids(predictions, items), about)


def vqa(predictions: Sequence[Prediction], *, variant: str = "official") -> ScoreReport:
    """Scores answers by VQA accuracy, with errors over images."""
    truths = [_annotated(one, one.answers) for one in predictions]
    texts = [one.text for one in predictions]
    return ScoreReport(*score_questions([one.id for one in predictions], texts, truths, variant))


def okvqa(
    predictions: Sequence[Prediction], *, wordnet: WordNet, variant: str = "official"
) -> ScoreReport:
    """Scores the stems of answers by VQA accuracy against OK-VQA's, with errors over images."""
    truths = [_annotated(one, one.details["stems"], one.answers) for one in predictions]
    texts = stem_predictions([one.text for one in predictions], truths, wordnet)
    ids = [one.id for one in predictions]
    metrics, items, about = score_questions(ids, texts, truths, variant)
    return ScoreReport(metrics, items, about | {"stems": okvqa_stems.ABOUT})


def wups(predictions: Sequence[Prediction], *, wordnet: WordNet) -> ScoreReport:
    """Scores answers by WUPS, with errors over videos."""
    answers = [
        VideoAnswer(one.cluster, one.text, one.answers, one.question_type) for one in predictions
    ]
    return ScoreReport(*score_video_answers([one.id for one in predictions], answers, wordnet))


def ivqa(predictions: Sequence[Prediction]) -> ScoreReport:
    """Scores answers by iVQA's accuracy: 1 where two of the annotators gave one, 0.5 where one
    did.
    """
    scores = [ivqa_accuracy(one.text, one.answers) for one in predictions]
    return _mean("accuracy", predictions, scores, _by_type(predictions, scores))


def exact(predictions: Sequence[Prediction]) -> ScoreReport:
    """Scores answers by exact match."""
    scores = [exact_match(one.text, one.answers) for one in predictions]
    return _mean("accuracy", predictions, scores, _by_type(predictions, scores))


def top_k(predictions: Sequence[Prediction], *, headline: str = "top-1") -> ScoreReport:
    """Scores rankings by whether a true class is the first, or among the first five.

    headline: the metric that is put first.
    """
    ranks = np.array([one.rank for one in predictions])
    clusters = _clusters(predictions)
    first, five = (ranks < 1).astype(float), (ranks < 5).astype(float)
    metrics = {
        "top-1": mean_estimate(first, clusters),
        "top-5": mean_estimate(five, clusters),
        "mean of top-1 and top-5": mean_estimate((first + five) / 2, clusters),
    }
    metrics = {headline: metrics[headline], **metrics}
    items = [{"top-1": a, "top-5": b} for a, b in zip(first.tolist(), five.tolist(), strict=True)]
    return ScoreReport(metrics, _with_ids(predictions, items), {})


def own_answers(predictions: Sequence[Prediction], *, majority_answer: str = "") -> ScoreReport:
    """Scores answers to own questions: VQA accuracy, or exact match where there is one answer.

    majority_answer: the training split's most frequent answer, whose score is given beside.
    """
    scores = [vqa_accuracy(one.text, one.answers) for one in predictions]
    report = _mean("accuracy", predictions, scores, _by_type(predictions, scores))
    if majority_answer:
        given = [vqa_accuracy(majority_answer, one.answers) for one in predictions]
        report.metrics["majority answer"] = mean_estimate(given, _clusters(predictions))
    return report


SCORERS: dict[str, PredictionScorer] = {
    "captions": captions,
    "vqa": vqa,
    "okvqa": okvqa,
    "exact": exact,
    "ivqa": ivqa,
    "wups": wups,
    "own_answers": own_answers,
    "top_k": top_k,
    **ranked_predictions.SCORERS,
}
READ_WORDNET = ("okvqa", "wups")
"""Scorers that are given `wordnet`."""


def _annotated(
    prediction: Prediction, answers: Sequence[str], raw_answers: Sequence[str] = ()
) -> Annotated:
    """Returns the ground truths of a prediction, see `benchmarks.annotators`."""
    details = prediction.details
    return Annotated(
        prediction.cluster or prediction.id,
        list(answers),
        list(raw_answers),
        details.get("records"),
        details.get("types", {}),
    )


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
