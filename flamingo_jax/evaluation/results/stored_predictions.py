"""Reads the predictions that a run stored, and scores them again from their file alone."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.protocol.benchmark import Prediction
from flamingo_jax.evaluation.protocol.journal import read_journal
from flamingo_jax.evaluation.scoring.predictions import SCORERS, score_predictions
from flamingo_jax.evaluation.scoring.report import ScoreReport


class StoredPredictions(NamedTuple):
    """The predictions of a run.

    about: what they are of: "protocol", "scorer", "scorer_options", ...
    """

    about: Mapping[str, Any]
    predictions: Sequence[Prediction]


def read_predictions(file: pathlib.Path) -> StoredPredictions:
    """Reads a file of predictions.

    Raises: UserError where it is missing, empty or malformed.
    """
    try:
        about, lines = read_journal(file)
    except (AttributeError, ValueError):
        raise UserError(f"{file} is no file of predictions of launch.evaluate") from None
    predictions = []
    for number, line in enumerate(lines, 2):
        try:
            predictions.append(Prediction.from_json(line))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{file}, line {number}, is no prediction: run it again") from None
    if not predictions:
        raise UserError(f"{file} has no predictions yet: finish the run by the same command")
    return StoredPredictions(about, predictions)


def rescore(stored: StoredPredictions, where: pathlib.Path, wordnet: str = "") -> ScoreReport:
    """Scores predictions by the scorer that their file names.

    Args:
      where: the file, for errors.
      wordnet: folder of WordNet's files, for scorers that read them; by default one that is
        found.

    Raises: UserError where it names none that is known, and without WordNet.
    """
    scorer, options = stored.about.get("scorer"), stored.about.get("scorer_options") or {}
    if scorer not in SCORERS:
        raise UserError(
            f"{where} names the scorer {scorer!r}, which is none of {', '.join(SCORERS)}: it was"
            " written by another version"
        )
    try:
        return score_predictions(scorer, stored.predictions, options, wordnet=wordnet)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{where} cannot be scored by {scorer!r} with the options {options}: {error}"
        ) from None


def rescore_file(file: pathlib.Path, wordnet: str = "") -> ScoreReport:
    """Scores a file of predictions; the report says by which scorer. Raises UserError."""
    stored = read_predictions(file)
    report = rescore(stored, file, wordnet)
    named = {name: stored.about.get(name) for name in ("scorer", "scorer_options")}
    return dataclasses.replace(report, about={**named, **report.about})


def item_score(item: Mapping[str, Any], metric: str) -> float | None:
    """Returns an item's score by a metric that is a mean of items, None where it has none.

    metric: a name in the item, or "mean of A and B" of two such names (Kinetics).
    """
    if metric in item:
        return float(item[metric])
    parts = metric.removeprefix("mean of ").split(" and ")
    if len(parts) == 2 and all(part in item for part in parts):
        return sum(float(item[part]) for part in parts) / 2
    return None
