"""Groups the results of a suite to the rows of a table: a benchmark by its numbers of shots."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flamingo_jax.evaluation.results.result_file import PAPER_SCALE, CellResult
from flamingo_jax.evaluation.statistics import seed_spread


class ScoreSummary(NamedTuple):
    """A score as papers print it, of one run or of several seeds.

    reach: half of the 95 % interval, or the standard deviation of several seeds; NaN where it is
      not known.
    low, high: the ends of the interval, or a deviation below and above the mean of the seeds.
    seeds: their number.
    """

    score: float
    reach: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        if math.isnan(self.score):
            return "not scored"
        text = f"{self.score:.1f}"
        if math.isfinite(self.reach):
            text += f" ± {self.reach:.1f}"
        return text + (f" ({self.seeds} seeds)" if self.seeds > 1 else "")


@dataclasses.dataclass(frozen=True)
class ScoreRow:
    """One benchmark and way to choose shots.

    selection: "" where it was run without shots alone.
    runs, controls: {shots: the results of each seed}; the controls' shots had no images.
    """

    selection: str
    runs: Mapping[int, Sequence[CellResult]]
    controls: Mapping[int, Sequence[CellResult]]

    @property
    def first(self) -> CellResult:
        """Returns a result, for what all have in common."""
        return next(iter({**self.controls, **self.runs}.values()))[0]

    @property
    def shots(self) -> list[int]:
        """Returns all numbers of shots."""
        return sorted({*self.runs, *self.controls})

    @property
    def cells(self) -> list[CellResult]:
        """Returns all results."""
        return [
            one for part in (self.runs, self.controls) for some in part.values() for one in some
        ]

    @property
    def queries(self) -> str:
        """Returns the number of queries, or the range of numbers that the runs had."""
        numbers = sorted({cell.n for cell in self.cells})
        return f"{numbers[0]:,}" + (f" to {numbers[-1]:,}" if len(numbers) > 1 else "")

    @property
    def missing(self) -> int:
        """Returns how many queries and support examples had no image, at most."""
        return max(cell.missing for cell in self.cells)


def summarise_seeds(cells: Sequence[CellResult]) -> ScoreSummary:
    """Summarises the headline scores of runs that differ by their seed."""
    estimates = [cell.estimate for cell in cells]
    if len(estimates) == 1:
        score, _, low, high = (PAPER_SCALE * value for value in estimates[0])
        return ScoreSummary(score, (high - low) / 2, low, high, 1)
    spread = seed_spread([PAPER_SCALE * one.score for one in estimates])
    mean, reach = spread.mean.score, spread.deviation
    return ScoreSummary(mean, reach, mean - reach, mean + reach, len(cells))


def rows_of(results: Sequence[CellResult]) -> list[ScoreRow]:
    """Groups results to rows; runs without shots belong to every row of their benchmark."""
    rows = []
    for benchmark in dict.fromkeys(cell.benchmark for cell in results):
        own = [cell for cell in results if cell.benchmark == benchmark]
        selections = dict.fromkeys(cell.selection for cell in own if cell.shots)
        for selection in selections or ("",):
            parts: tuple[dict[int, list[CellResult]], ...] = ({}, {})
            for cell in sorted(own, key=lambda one: (one.shots, one.seed)):
                if not cell.shots or cell.selection == selection:
                    parts[cell.control].setdefault(cell.shots, []).append(cell)
            rows.append(ScoreRow(selection, *parts))
    return rows
