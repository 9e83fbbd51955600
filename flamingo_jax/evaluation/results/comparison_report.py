"""Lays runs of a suite side by side, in Markdown and HTML."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from flamingo_jax.evaluation.results.comparison import (
    CellComparison,
    CellKey,
    SuiteRun,
    compare_cells,
    warnings,
)
from flamingo_jax.evaluation.results.markup import html_table, markdown_table
from flamingo_jax.evaluation.results.result_file import PAPER_SCALE
from flamingo_jax.evaluation.results.score_table import summarise_seeds
from flamingo_jax.web_page import page

TITLE = "Runs side by side"
NOTE = (
    "Scores are on the papers' scale: CIDEr times 100, all else in per cent; ± is half of the 95 %"
    " interval. A difference is that on the items that both runs have (queries; actions for mWAP),"
    " with its 95 % interval; p is two-sided and of its row alone: of twenty rows without a"
    " difference, one has p < 0.05."
)
STYLE = """
td { vertical-align: top } td small { display: block; color: #778; font-size: .8rem }
.note { color: #667; max-width: 60rem }
.warning { border-left: 5px solid #d55e00; background: #fdf3ec; padding: .5rem .9rem }
"""


class RunComparison(NamedTuple):
    """Runs side by side.

    header, rows: of the table; a cell's further lines are small.
    warnings: what besides the model differs, a sentence each.
    only: cells that not all runs have, a sentence each.
    """

    header: list[str]
    rows: list[list[str]]
    warnings: list[str]
    only: list[str]

    def markdown(self) -> str:
        """Writes the comparison in Markdown."""
        parts = [f"# {TITLE}", *(f"**Warning:** {one}" for one in self.warnings)]
        parts += [markdown_table(self.header, self.rows).strip("\n"), NOTE, *self.only]
        return "\n\n".join(parts) + "\n"

    def page(self) -> str:
        """Writes the comparison as an HTML page."""
        parts = [f'<p class="warning">{html.escape(one)}</p>' for one in self.warnings]
        parts.append(html_table(self.header, self.rows))
        parts += [f'<p class="note">{html.escape(one)}</p>' for one in (NOTE, *self.only)]
        return page(TITLE, parts, style=STYLE)


def compare_runs(runs: Sequence[SuiteRun], wordnet: str = "") -> RunComparison:
    """Compares every run with the first, cell by cell.

    wordnet: see `stored_predictions.rescore`.

    Raises: UserError where stored predictions are missing or malformed, and without WordNet.
    """
    first, *others = runs
    keys = list(dict.fromkeys(key for run in runs for key in run.cells))
    shared = [key for key in keys if any(key in run.cells for run in others) and key in first.cells]
    header = ["benchmark", "shots", first.name]
    for run in others:
        header += [run.name, f"{run.name} − {first.name}", "p"]
    seeded = len({key.seed for key in keys}) > 1
    rows = []
    for key in sorted(shared):
        row = [_name(first, key, seeded), str(key.shots), _score(first, key)]
        for run in others:
            row += [_score(run, key), *_difference(first, run, key, wordnet)]
        rows.append(row)
    told = [warning for run in others for warning in warnings(first, run)]
    only = [
        f"Only in {run.name}: {', '.join(run.cells[key].name for key in sorted(alone))}."
        for run in runs
        if (alone := [key for key in run.cells if sum(key in one.cells for one in runs) == 1])
    ]
    return RunComparison(header, rows, told, only)


def _name(run: SuiteRun, key: CellKey, seeded: bool) -> str:
    cell = run.cells[key]
    parts = [key.selection] if key.selection else []
    parts += ["shots without images"] if key.control else []
    parts += [f"seed {key.seed}"] if seeded else []
    return f"{cell.title}\n{', '.join([cell.headline, *parts])}"


def _score(run: SuiteRun, key: CellKey) -> str:
    return str(summarise_seeds([run.cells[key]])) if key in run.cells else "–"


def _difference(first: SuiteRun, second: SuiteRun, key: CellKey, wordnet: str) -> tuple[str, str]:
    """Returns the difference with its interval, and p."""
    if key not in second.cells:
        return "–", "–"
    found = compare_cells(first, second, key, wordnet)
    return _told(found), _p(found)


def _told(found: CellComparison) -> str:
    one = found.difference
    if one is None:
        return f"–\n{found.why}"
    score, low, high = (PAPER_SCALE * value for value in (one.difference, one.low, one.high))
    text = f"{score:+.1f}"
    if math.isfinite(low):
        text += f" [{low:+.1f}, {high:+.1f}]"
    return text + f"\n{found.items:,} items" + (f"; {found.why}" if found.why else "")


def _p(found: CellComparison) -> str:
    one = found.difference
    if one is None or not math.isfinite(one.p):
        return "–"
    return f"{one.p:.3f}" if one.p >= 0.001 else "< 0.001"
