"""Scores rankings and scores of classes: RareAct (mWAP), VisDial (NDCG) and HatefulMemes (area
under the ROC curve).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.metrics.average_precision import roc_auc
from flamingo_jax.evaluation.metrics.mwap import RareActSegment, weighted_average_precisions
from flamingo_jax.evaluation.metrics.ndcg import ndcg
from flamingo_jax.evaluation.scoring import files
from flamingo_jax.evaluation.scoring.report import ScoreReport, match
from flamingo_jax.evaluation.statistics import bootstrap_estimate, mean_estimate

RAREACT = ("video_id", "class_id", "verb", "noun", "annotation")


def score_mwap_files(annotations: str, predictions: str) -> ScoreReport:
    """Scores actions by mWAP, whose error is that of the mean over actions.

    Args:
      annotations: rareact.csv.
      predictions: .npy, float [rows, classes], each class's score for each row of the CSV.

    Raises: UserError for a malformed file or an array of another shape.
    """
    segments = read_rareact(annotations)
    scores = files.read_array(predictions)
    classes = max((row.class_id for row in segments), default=-1) + 1
    if scores.ndim != 2 or scores.shape[0] != len(segments) or scores.shape[1] < classes:
        raise UserError(
            f"{predictions} has the shape {list(scores.shape)}, but {annotations} needs"
            f" [{len(segments)}, {classes}]: a row for each of its rows, a column for each class"
        )
    return mwap_report(
        segments, scores, annotations, {"annotations_sha256": files.digest(annotations)}
    )


def read_rareact(annotations: str) -> list[RareActSegment]:
    """Reads the rows of rareact.csv.

    Raises: UserError for a malformed row.
    """
    segments = []
    for number, row in enumerate(files.read_csv(annotations, RAREACT), 2):
        where = f"{annotations}, row {number},"
        class_id = files.whole_number(row, "class_id", where)
        if class_id < 0:
            raise UserError(f"{where} has a negative class_id")
        annotation = files.whole_number(row, "annotation", where)
        segments.append(
            RareActSegment(row["video_id"], class_id, row["verb"], row["noun"], annotation)
        )
    return segments


def mwap_report(
    segments: Sequence[RareActSegment], scores: np.ndarray, where: str, about: dict[str, Any]
) -> ScoreReport:
    """Scores actions by mWAP; the report's items are the actions.

    Raises: UserError where no segment is positive.
    """
    found = weighted_average_precisions(segments, scores)
    if not found:
        raise UserError(f"{where} has no row with annotation 1: no action can be scored")
    items = [{"id": " ".join(action), "mWAP": score} for action, score in found.items()]
    return ScoreReport({"mWAP": mean_estimate(list(found.values()))}, items, about)


def score_ndcg_files(
    annotations: str, predictions: str, *, skip_incomplete: bool = False
) -> ScoreReport:
    """Scores ranked answers of dialogues by NDCG.

    Args:
      annotations: VisDial's dense annotations, [{"image_id", "round_id", "gt_relevance"}].
      predictions: the challenge's form, [{"image_id", "round_id", "ranks"}], the rank of each
        option from 1; or with "scores", higher for better options.
      skip_incomplete: whether to go on with the rounds that have both.

    Raises: UserError for a malformed file, and for missing or surplus predictions.
    """
    truths = _rounds(annotations, ("gt_relevance", "relevance"))
    found = _rounds(predictions, ("ranks", "scores"))
    matched = match(truths, found, "round", skip_incomplete)
    items: list[dict[str, Any]] = []
    for key in matched.scored:
        (_, relevance), (name, values) = truths[key], found[key]
        where = f"{predictions}, image {key[0]}, round {key[1]},"
        if len(values) != len(relevance):
            raise UserError(f"{where} has {len(values)} {name} for {len(relevance)} options")
        if name == "ranks" and sorted(values) != list(range(1, len(values) + 1)):
            raise UserError(f"{where} has ranks that are not 1 to {len(values)}, each once")
        if not np.any(relevance):
            raise UserError(
                f"{annotations}, image {key[0]}, round {key[1]}, has no relevant option"
            )
        score = ndcg(-values if name == "ranks" else values, relevance)
        items.append({"id": list(key), "NDCG": score})
    metrics = {"NDCG": mean_estimate([item["NDCG"] for item in items])}
    about = {"annotations_sha256": files.digest(annotations)}
    return ScoreReport(metrics, items, about, matched.missing, matched.surplus)


def score_auc_files(
    annotations: str, predictions: str, *, skip_incomplete: bool = False
) -> ScoreReport:
    """Scores the probabilities of yes by the area under the ROC curve.

    Args:
      annotations: HatefulMemes' form, a line {"id", "label"} for each example, label 0 or 1; or a
        list of them.
      predictions: {id: probability}, or lines or a list of {"id", "proba"}.
      skip_incomplete: whether to go on with the examples that have both.

    Raises: UserError for a malformed file, and for missing or surplus predictions.
    """
    truths = {}
    for number, entry in enumerate(files.read_json_lines(annotations)):
        where = f"{annotations}, entry {number},"
        label = files.field(entry, "label", where, int)
        if label not in (0, 1):
            raise UserError(f"{where} has the label {label}, not 0 or 1")
        truths[str(files.field(entry, "id", where, int, str))] = label
    found = _probabilities(predictions)
    matched = match(truths, found, "example", skip_incomplete)
    report = auc_report(
        matched.scored,
        np.array([truths[key] for key in matched.scored]) == 1,
        np.array([found[key] for key in matched.scored]),
        {"annotations_sha256": files.digest(annotations)},
    )
    return dataclasses.replace(report, missing=matched.missing, surplus=matched.surplus)


def auc_report(
    ids: Sequence[str], labels: np.ndarray, scores: np.ndarray, about: dict[str, Any]
) -> ScoreReport:
    """Scores by the area under the ROC curve, with its error over resamples.

    Args:
      labels: bool [N].
      scores: float [N], higher for True.

    Raises: UserError where all labels are equal.
    """
    if labels.all() or not labels.any():
        raise UserError(f"all examples scored have the label {int(labels[0])}: both are needed")
    estimate = bootstrap_estimate(lambda counts: roc_auc(labels, scores, counts), len(labels))
    items = [
        {"id": key, "label": int(label), "score": float(score)}
        for key, label, score in zip(ids, labels, scores, strict=True)
    ]
    return ScoreReport({"ROC AUC": estimate}, items, about)


def _rounds(place: str, names: tuple[str, str]) -> dict[tuple[Any, Any], tuple[str, np.ndarray]]:
    """Reads {(image id, round id): (name, values)}, of the first of `names` that is there."""
    entries = files.as_list(files.read_json(place), place)

    def read(number: int, entry: Any) -> tuple[tuple[Any, Any], tuple[str, np.ndarray]]:
        where = f"{place}, entry {number},"
        key = files.field(entry, "image_id", where, int), files.field(entry, "round_id", where, int)
        name = next((name for name in names if name in entry), names[0])
        values = files.field(entry, name, where, list)
        return key, (name, _values(values, f"{where} {name},"))

    return files.by_id((read(*pair) for pair in enumerate(entries)), place)


def _values(values: list[Any], where: str) -> np.ndarray:
    if not all(type(value) in (int, float) for value in values) or not np.isfinite(values).all():
        raise UserError(f"{where} must be finite numbers")
    return np.array(values, np.float64)


def _probabilities(place: str) -> dict[str, float]:
    """Reads {id: probability}."""
    text = files.read_text(place)
    entries: list[Any]
    if text.lstrip().startswith("{") and "\n{" not in text.strip():
        content = files.as_dict(files.parse_json(text, place), place)
        entries = [{"id": key, "proba": value} for key, value in content.items()]
    else:
        entries = files.read_json_lines(place)

    def read(number: int, entry: Any) -> tuple[str, float]:
        where = f"{place}, entry {number},"
        value = files.field(entry, "proba", where, int, float)
        return str(files.field(entry, "id", where, int, str)), float(_values([value], where)[0])

    return files.by_id((read(*pair) for pair in enumerate(entries)), place)
