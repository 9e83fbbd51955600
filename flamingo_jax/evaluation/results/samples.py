"""Chooses stored predictions to show: failures first."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.protocol.benchmark import Prediction
from flamingo_jax.evaluation.results.result_file import CellResult
from flamingo_jax.evaluation.results.score_table import ScoreRow
from flamingo_jax.evaluation.results.stored_predictions import item_score, read_predictions, rescore
from flamingo_jax.processing.visuals import Visual

FAILURES, OTHERS = 8, 4
"""How many of the worst predictions are shown, and how many of the rest."""

VisualOf = Callable[[str], Visual | None]
"""Id of a query -> its image or clip; None where it is not there."""


class Sample(NamedTuple):
    """A prediction that is shown.

    score: by the headline metric or what it is made of; None where that is not a score of
      single items.
    """

    prediction: Prediction
    score: float | None


def shown_cell(row: ScoreRow) -> CellResult:
    """Returns the run whose predictions are shown: that with most shots."""
    runs = row.runs or row.controls
    return runs[max(runs)][0]


def choose_samples(output: pathlib.Path, cell: CellResult) -> list[Sample]:
    """Reads a run's predictions, and chooses the worst and some spread over the rest.

    Returns: samples, the lowest scores first; [] where the file is missing or malformed.
    """
    file = output / cell.predictions
    try:
        stored = read_predictions(file)
    except UserError:
        return []
    try:
        items = rescore(stored, file).items
    except UserError:
        items = []
    by_id: dict[str, Mapping[str, Any]] = {str(item.get("id")): item for item in items}
    samples = [
        Sample(one, _item_score(by_id.get(one.id, {}), cell.headline, one))
        for one in stored.predictions
    ]
    samples.sort(key=lambda one: 1.0 if one.score is None else one.score)
    rest = samples[FAILURES:]
    places = np.linspace(0, len(rest) - 1, min(OTHERS, len(rest))).round().astype(int)
    return [*samples[:FAILURES], *(rest[place] for place in places)]


def _item_score(item: Mapping[str, Any], headline: str, prediction: Prediction) -> float | None:
    for name in (headline, "accuracy"):
        if (score := item_score(item, name)) is not None:
            return score
    if "label" in item and 0 <= item.get("score", -1) <= 1:
        # The area under a curve is no mean of items: how right each probability is.
        return 1.0 - abs(float(item["label"]) - float(item["score"]))
    return None if prediction.rank < 0 else float(prediction.rank == 0)
