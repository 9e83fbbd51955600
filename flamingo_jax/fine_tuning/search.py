"""The grid search: trains and scores cell after cell, and scores the best one on the test split
(paper 3.2, B.2.2). Any part of it that was finished in an earlier start is not done again.
"""

import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Callable, Sequence

from flamingo_jax.checkpointing.export import open_export
from flamingo_jax.errors import NotFiniteError, UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.fine_tuning.checks import require_same_cell
from flamingo_jax.fine_tuning.grid import Cell
from flamingo_jax.fine_tuning.results import (
    RESULTS,
    TABLE,
    TEST,
    TunedCell,
    best_cell,
    markdown,
    read_cell,
    read_score,
    results_json,
    results_table,
    score_json,
    write_cell,
    write_json,
)
from flamingo_jax.fine_tuning.scoring import SplitScore
from flamingo_jax.json_lines import read_lines
from flamingo_jax.paths import make_folder, remove_folder
from flamingo_jax.training.exporting import export_run
from flamingo_jax.training.goodput import read_goodput
from flamingo_jax.training.trained_run import read_experiment
from flamingo_jax.web_page import Table

log = logging.getLogger(__name__)

CELLS, EXPORT, BEST = "cells", "export", "best"

Train = Callable[[Experiment, pathlib.Path], int]
"""(experiment, workdir) -> exit code; trains to the end, resuming what is there, with 0, or saves
and stops at a signal with another code.
"""
Score = Callable[[pathlib.Path, Experiment, str, int], SplitScore]
"""(export, experiment, split, most records) -> its score: `scoring.score_split`."""


@dataclasses.dataclass(frozen=True)
class Search:
    """A grid search in a folder.

    output: for each cell a workdir, `cells/NAME`, with an export of what was trained; `best`, the
      whole export of the best cell; and the results.
    metric: as results name it.
    train, score: how a cell is trained and an export scored.
    """

    output: pathlib.Path
    cells: Sequence[Cell]
    metric: str
    train: Train
    score: Score

    def run(self) -> tuple[int, Table]:
        """Runs all cells that have not finished, and then scores the best one on the test split.

        Returns: (exit code of a training that was stopped by a signal, or 0; the table so far).

        Raises: UserError where the folder has cells of another config or model, or all failed.
        """
        for cell in self.cells:
            self._require_same(cell)
        results: list[TunedCell] = []
        for place, cell in enumerate(self.cells, 1):
            if (known := read_cell(self._folder(cell))) is None:
                log.info("cell %d of %d: %s", place, len(self.cells), cell.name)
            outcome = known or self._run_cell(cell)
            if isinstance(outcome, int):
                return outcome, self._write(results, None)
            results.append(outcome)
            self._write(results, None)
        best = best_cell(results)
        if best is None:
            raise UserError(
                f"all cells failed ({results[0].failed}): try smaller learning rates, in another"
                " --output"
            )
        return 0, self._finish(results, best)

    def _folder(self, cell: Cell) -> pathlib.Path:
        return self.output / CELLS / cell.name

    def _require_same(self, cell: Cell) -> None:
        """Raises UserError where the cell's folder is of another config or model."""
        folder = self._folder(cell)
        if (folder / "config.json").is_file():
            require_same_cell(folder, read_experiment(folder), cell.experiment)
        result = read_cell(folder)
        if result is not None and result.model != _digest(cell.experiment):
            raise UserError(
                f"{folder} was trained from another model than {cell.experiment.flamingo_from}"
                " now holds: name another --output"
            )

    def _run_cell(self, cell: Cell) -> TunedCell | int:
        """Trains, exports and scores a cell; returns the exit code of a training that stopped."""
        folder, experiment = self._folder(cell), cell.experiment
        make_folder(folder)
        result = TunedCell(cell.name, cell.settings, _digest(experiment), None, None, 0.0)
        try:
            if code := self.train(experiment, folder):
                return code
        except NotFiniteError as error:
            # One cell's learning rate was too high; the others may be fine.
            log.warning("%s: %s", cell.name, error)
            result = dataclasses.replace(
                result, seconds=_trained_seconds(folder), failed="not finite"
            )
            write_cell(folder, result)
            return result
        export = folder / EXPORT
        if not export.exists():
            export_run(folder, export, trained_only=True)
        began = time.monotonic()
        scoring = experiment.fine_tuning
        score = self.score(export, experiment, scoring.validation_split, scoring.limit)
        result = dataclasses.replace(
            result,
            loss=_last_loss(folder),
            score=score,
            seconds=_trained_seconds(folder) + time.monotonic() - began,
        )
        write_cell(folder, result)
        return result

    def _finish(self, results: Sequence[TunedCell], best: TunedCell) -> Table:
        """Scores the best cell on the test split and exports it whole, unless that is done."""
        cell = next(cell for cell in self.cells if cell.name == best.name)
        folder, split = self._folder(cell), cell.experiment.fine_tuning.test_split
        test = read_score(folder / TEST)
        if split and test is None:
            log.info("scoring the best cell on %s: %s", split, best.name)
            test = self.score(folder / EXPORT, cell.experiment, split, 0)
            write_json(folder / TEST, score_json(test) or {})
        export, mark = self.output / BEST, self.output / f"{BEST}.json"
        if not (mark.is_file() and json.loads(mark.read_text())["cell"] == best.name):
            if export.exists():  # Of a smaller grid, or without its mark since it was killed.
                remove_folder(export)
            export_run(folder, export)
            write_json(mark, {"cell": best.name})
        return self._write(results, test)

    def _write(self, results: Sequence[TunedCell], test: SplitScore | None) -> Table:
        """Writes results.json and the table, and returns the table."""
        write_json(self.output / RESULTS, results_json(self.metric, results, len(self.cells), test))
        table = results_table(self.metric, self.cells, results, test)
        (self.output / TABLE).write_text(markdown(table))
        return table


def _digest(experiment: Experiment) -> str:
    return open_export(experiment.flamingo_from).digest


def _last_loss(folder: pathlib.Path) -> float | None:
    """Returns a run's last held-out loss, or its last training loss; None without any."""
    lines = read_lines(folder / "metrics.jsonl")
    for key in ("held_out/loss", "loss"):
        if found := [line[key] for line in lines if key in line]:
            return float(found[-1])
    return None


def _trained_seconds(folder: pathlib.Path) -> float:
    """Returns the seconds that a run's starts took, without the time between them."""
    seconds = read_goodput(folder).seconds
    return sum(seconds.values()) - seconds["down"]
