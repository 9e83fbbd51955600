"""Scorers of predictions whose candidates were ranked, and of words learned in context."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.metrics.mwap import RareActSegment
from flamingo_jax.evaluation.metrics.ndcg import ndcg as ndcg_of
from flamingo_jax.evaluation.protocol.benchmark import Prediction
from flamingo_jax.evaluation.scoring.ranked import auc_report, mwap_report
from flamingo_jax.evaluation.scoring.report import ScoreReport
from flamingo_jax.evaluation.statistics import bootstrap_estimate, mean_estimate

Values = Literal["log-likelihood", "softmax"]
"""What compares a candidate over queries: its log-likelihood, or its probability among the
candidates of its query.
"""


def choice(predictions: Sequence[Prediction]) -> ScoreReport:
    """Scores multiple choice by accuracy: over all, by type, and by the first letter of the type
    where types share it (NExT-QA's eval_mc.py: Acc_C, Acc_T and Acc_D).
    """
    scores = [float(one.rank == 0) for one in predictions]
    groups: dict[str, list[float]] = defaultdict(list)
    for one, score in zip(predictions, scores, strict=True):
        for name in {one.question_type, one.question_type[:1]} - {""}:
            groups[name].append(score)
    by_type = {name: float(np.mean(some)) for name, some in sorted(groups.items())}
    return _mean("accuracy", predictions, scores, {"by_type": by_type} if by_type else {})


def mean_of_types(predictions: Sequence[Prediction]) -> ScoreReport:
    """Scores multiple choice by the mean of the accuracies of each type of question (STAR), with
    its error over resamples of videos.
    """
    right = np.array([one.rank == 0 for one in predictions], float)
    types = np.array([one.question_type for one in predictions])
    masks = {name: types == name for name in sorted(set(types.tolist()))}

    def statistic(counts: np.ndarray) -> float:
        drawn = [(counts * mask, counts[mask].sum()) for mask in masks.values()]
        if not all(total for _, total in drawn):
            return float("nan")
        return float(np.mean([weights @ right / total for weights, total in drawn]))

    clusters = _clusters(predictions)
    metrics = {"mean of types": bootstrap_estimate(statistic, len(predictions), clusters)}
    for name, mask in masks.items():
        own = [cluster for cluster, used in zip(clusters, mask, strict=True) if used]
        metrics[name] = mean_estimate(right[mask], own)
    metrics["accuracy"] = mean_estimate(right, clusters)
    items = [{"id": one.id, "accuracy": float(one.rank == 0)} for one in predictions]
    return ScoreReport(metrics, items, {})


def mwap(predictions: Sequence[Prediction], *, values: Values = "log-likelihood") -> ScoreReport:
    """Scores RareAct's rows by mWAP. Their details are video, class_id, verb, noun, annotation;
    candidates are the actions by class_id.
    """
    segments = [
        RareActSegment(
            one.details["video"],
            one.details["class_id"],
            one.details["verb"],
            one.details["noun"],
            one.details["annotation"],
        )
        for one in predictions
    ]
    scores = np.stack([_values(one, values) for one in predictions])
    return mwap_report(segments, scores, "the run", {"values": values})


def ndcg(predictions: Sequence[Prediction]) -> ScoreReport:
    """Scores VisDial's rounds by NDCG; details["relevance"] is that of each candidate."""
    scores = []
    for one in predictions:
        relevance = np.array(one.details["relevance"], float)
        if not relevance.any():
            raise UserError(f"the round {one.id} has no relevant option: leave it out")
        scores.append(ndcg_of(_values(one), relevance))
    return _mean("NDCG", predictions, scores, {})


def auc(
    predictions: Sequence[Prediction], *, positive: int = 1, values: Values = "softmax"
) -> ScoreReport:
    """Scores a choice between two by the area under the ROC curve.

    positive: the number of the positive candidate.
    """
    labels = [one.ranking[one.rank][0] == positive for one in predictions]
    scores = [_values(one, values)[positive] for one in predictions]
    ids = [one.id for one in predictions]
    return auc_report(ids, np.array(labels), np.array(scores), {"values": values})


def first_line(predictions: Sequence[Prediction]) -> ScoreReport:
    """Scores answers by whether their first line, or else first sentence, equals the answer but
    for case, as VL-ICL's eval.py does.
    """
    scores = []
    for one in predictions:
        said, _, _ = one.text.strip().partition("\n")
        if "\n" not in one.text.strip() and said.find(".") > 0:
            said = said[: said.find(".")]
        scores.append(float(said.lower() in {answer.lower() for answer in one.answers}))
    return _mean("accuracy", predictions, scores, {})


SCORERS: dict[str, Callable[..., ScoreReport]] = {
    "choice": choice,
    "mean_of_types": mean_of_types,
    "mwap": mwap,
    "ndcg": ndcg,
    "auc": auc,
    "first_line": first_line,
}


def _values(one: Prediction, values: Values = "log-likelihood") -> np.ndarray:
    """Returns a value of each candidate, by its number."""
    found = np.empty(len(one.ranking))
    for number, value in one.ranking:
        found[number] = value
    if values == "log-likelihood":
        return found
    shares = np.exp(found - np.max(found))
    return shares / shares.sum()


def _mean(
    name: str, predictions: Sequence[Prediction], scores: Sequence[float], about: dict[str, Any]
) -> ScoreReport:
    items = [{"id": one.id, name: score} for one, score in zip(predictions, scores, strict=True)]
    return ScoreReport({name: mean_estimate(scores, _clusters(predictions))}, items, about)


def _clusters(predictions: Sequence[Prediction]) -> list[str]:
    return [one.cluster or one.id for one in predictions]
