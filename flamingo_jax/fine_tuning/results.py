"""The results of a grid: each cell's on disk, the best one, and the table."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_jax.fine_tuning.grid import Cell, Value, written
from flamingo_jax.fine_tuning.scoring import SplitScore
from flamingo_jax.web_page import Table

RESULTS, TABLE = "results.json", "results.md"
CELL, TEST = "result.json", "test.json"


@dataclasses.dataclass(frozen=True)
class TunedCell:
    """What came of one cell.

    model: digest of the export that it began from.
    loss: of the held-out dataset, or of training where there is none; in nats.
    score: on the validation split, with its 95 % interval; None for a cell that failed.
    seconds: of training over all starts, without the time between them, and of scoring.
    failed: why the cell has no score; "" for a finished one.
    """

    name: str
    settings: Mapping[str, Value]
    model: str
    loss: float | None
    score: SplitScore | None
    seconds: float
    failed: str = ""


def read_cell(folder: pathlib.Path) -> TunedCell | None:
    """Reads a cell's result; None where it has not finished."""
    file = folder / CELL
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    return TunedCell(**(found | {"score": _score_of(found["score"])}))


def write_cell(folder: pathlib.Path, result: TunedCell) -> None:
    """Writes a cell's result, which marks it as finished."""
    write_json(folder / CELL, cell_json(result))


def best_cell(results: Sequence[TunedCell]) -> TunedCell | None:
    """Returns the cell of the highest validation score, the first of equal ones; None where none
    has one.
    """
    scored = [(r.score.score, r) for r in results if r.score is not None]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def results_json(
    metric: str, results: Sequence[TunedCell], cells: int, test: SplitScore | None
) -> dict[str, Any]:
    """Makes the content of results.json. cells: how many the grid has, finished or not."""
    best = best_cell(results)
    return {
        "metric": metric,
        "cells": [cell_json(result) for result in results],
        "unfinished": cells - len(results),
        "best": best and best.name,
        "test": score_json(test),
    }


def results_table(
    metric: str, cells: Sequence[Cell], results: Sequence[TunedCell], test: SplitScore | None
) -> Table:
    """Makes the table: a row for each finished cell, in the grid's order, the best one marked,
    and one for the best cell's score on the test split. Scores are in per cent.
    """
    keys = list(cells[0].settings)
    best = best_cell(results)
    rows: list[list[Any]] = []
    for result in results:
        shown = [written(result.settings[key]) for key in keys] or [result.name]
        score = result.failed or (with_interval(result.score) if result.score else "")
        mark = "best" if result is best else ""
        rows.append([*shown, number(result.loss), score, f"{result.seconds:.0f}", mark])
    if best is not None and test is not None:
        blank = [""] * (len(keys) or 1)
        rows.append([*blank, "", with_interval(test), "", f"test, {test.records} records"])
    header = [*(keys or ["cell"]), "loss", f"{metric} (95 %)", "seconds", ""]
    return Table("Fine-tuning", header, rows)


def markdown(table: Table) -> str:
    """Writes a table in Markdown."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"

    return line(table.header) + line(["---"] * len(table.header)) + "".join(map(line, table.rows))


def with_interval(score: SplitScore) -> str:
    """Writes a score in per cent with its interval."""
    text = f"{100 * score.score:.1f}"
    if math.isfinite(score.low) and math.isfinite(score.high):
        text += f" ({100 * score.low:.1f} to {100 * score.high:.1f})"
    return text


def number(value: float | None) -> str:
    """Writes a loss."""
    return "" if value is None else f"{value:.4f}"


def cell_json(result: TunedCell) -> dict[str, Any]:
    """Returns a cell's result as JSON can hold it."""
    return vars(result) | {"settings": dict(result.settings), "score": score_json(result.score)}


def score_json(score: SplitScore | None) -> dict[str, Any] | None:
    """Returns a score as JSON can hold it, which has no NaN."""
    if score is None:
        return None
    known = math.isfinite(score.low) and math.isfinite(score.high)
    return {
        "score": score.score,
        "interval_95": [score.low, score.high] if known else None,
        "records": score.records,
    }


def read_score(file: pathlib.Path) -> SplitScore | None:
    """Reads the score in a file; None where there is none."""
    return _score_of(json.loads(file.read_text())) if file.is_file() else None


def _score_of(document: Mapping[str, Any] | None) -> SplitScore | None:
    if document is None:
        return None
    low, high = document["interval_95"] or (math.nan, math.nan)
    return SplitScore(document["score"], low, high, document["records"])


def write_json(file: pathlib.Path, document: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(file)
