"""Draws a benchmark's scores against the number of shots, as SVG: the model's with its error, the
control dashed, and published figures as thin lines. Lines are labelled at their right ends, so that
no legend covers them.
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flamingo_jax.evaluation.charts import COLOURS, FAINT, STYLE
from flamingo_jax.evaluation.results.published import Shots, published_scores
from flamingo_jax.evaluation.results.result_file import CellResult
from flamingo_jax.evaluation.results.score_table import ScoreRow, ScoreSummary, summarise_seeds

SHOWN = (
    "Flamingo-3B",
    "Flamingo-9B",
    "Flamingo-80B",
    "OpenFlamingo-9B",
    "IDEFICS-9B",
    "IDEFICS-80B",
    "Flamingo-3B, RICES",
    "Flamingo-80B, RICES",
    "OpenFlamingo-9B, RICES",
    "MM1-3B",
)
"""Published models that charts show; the tables list all."""
MUTED = {
    "Flamingo": "#7a8699",
    "OpenFlamingo": "#5f9a8a",
    "IDEFICS": "#b08a5b",
    "MM1": "#9a7fae",
}
WIDTH, HEIGHT = 7.2, 3.9
LABEL_POINTS = 11.0
"""Height of a label's line, in points."""
ASIDE = 0.015
"""How far right of its place a control is drawn, as a share of the axis, so that its error bars do
not cover those of the run.
"""
MOST = 100.0
"""The highest score on the papers' scale, besides CIDEr."""
AXES_POINTS = HEIGHT * 72 - 62
"""Height of the axes without title and ticks."""


@dataclasses.dataclass(frozen=True)
class _Line:
    label: str
    colour: str
    points: Mapping[int, ScoreSummary]
    own: bool = True
    dashed: bool = False


def published_beside(
    rows: Sequence[ScoreRow], names: Sequence[str] | None = None
) -> dict[str, Shots]:
    """Returns {model: {shots: score}} of the published models whose shots were chosen in one of
    the ways of the rows, or at random where none was.

    names: the models wanted; None for all.
    """
    selections = {row.selection for row in rows if row.selection} or {"random"}
    if not selections & {"random", "rices"}:
        selections = {"random"}
    found: dict[str, Shots] = {}
    for selection in sorted(selections):
        found |= published_scores(rows[0].first.benchmark, selection)
    return {name: found[name] for name in found if names is None or name in names}


def shot_chart(rows: Sequence[ScoreRow]) -> str:
    """Draws the rows of one benchmark as an SVG element; "" where there is nothing to draw."""
    lines = [*_published_lines(rows), *_own_lines(rows)]
    if not lines:
        return ""
    shots = sorted({number for line in lines for number in line.points})
    lowest = min((number for number in shots if number), default=2)

    def place(number: int) -> float:
        """Puts 0 shots one doubling below the smallest number."""
        return math.log2(number) if number else math.log2(lowest) - 1

    first = rows[0].first
    aside = ASIDE * (place(shots[-1]) - place(shots[0]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            moved = aside * line.dashed
            _draw(axes, line, [place(number) + moved for number in sorted(line.points)])
        axes.set_xticks([place(number) for number in shots], [str(number) for number in shots])
        axes.set_title(first.title, loc="left", fontweight="bold", fontsize=11)
        axes.set(xlabel="shots", ylabel=f"{first.headline} × 100")
        axes.grid(color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.03, y=0.08)
        _bound(axes, math.inf if "CIDEr" in first.headline else MOST)
        _label(axes, lines, [place(max(line.points)) + aside * line.dashed for line in lines])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :]


def _own_lines(rows: Sequence[ScoreRow]) -> list[_Line]:
    several = len(rows) > 1
    lines = []
    for row, colour in zip(rows, COLOURS, strict=False):
        name = f"this model, {row.selection}" if several else "this model"
        points, control = _points(row.runs), _points(row.controls)
        blind = f"shots without images, {row.selection}" if several else "shots without images"
        lines += [_Line(name, colour, points)] if points else []
        lines += [_Line(blind, colour, control, dashed=True)] if control else []
    return lines


def _points(runs: Mapping[int, Sequence[CellResult]]) -> dict[int, ScoreSummary]:
    """Returns {shots: score} of the runs that could be scored."""
    points = {shots: summarise_seeds(cells) for shots, cells in runs.items()}
    return {shots: point for shots, point in points.items() if not math.isnan(point.score)}


def _published_lines(rows: Sequence[ScoreRow]) -> list[_Line]:
    return [
        _Line(
            name,
            MUTED[name.partition("-")[0]],
            {
                number: ScoreSummary(score, math.nan, math.nan, math.nan, 1)
                for number, score in shots.items()
            },
            own=False,
        )
        for name, shots in published_beside(rows, SHOWN).items()
    ]


def _draw(axes: Axes, line: _Line, places: Sequence[float]) -> None:
    points = [line.points[number] for number in sorted(line.points)]
    scores = np.array([one.score for one in points])
    if not line.own:
        marker = "." if len(places) == 1 else None
        axes.plot(places, scores, color=line.colour, linewidth=0.9, marker=marker, zorder=2)
        return
    low, high = (np.array([getattr(one, end) for one in points]) for end in ("low", "high"))
    if len(places) > 1 and not line.dashed:
        axes.fill_between(places, low, high, color=line.colour, alpha=0.13, linewidth=0, zorder=3)
    axes.errorbar(
        places,
        scores,
        yerr=np.nan_to_num([scores - low, high - scores]),
        color=line.colour,
        linewidth=2.0,
        linestyle=(0, (4, 2)) if line.dashed else "solid",
        marker="o",
        markersize=5,
        markerfacecolor="white" if line.dashed else line.colour,
        elinewidth=1.0,
        capsize=2.5,
        zorder=4,
    )


def _bound(axes: Axes, most: float) -> None:
    """Cuts the axis where no score can be: below 0, where intervals may reach, and above `most`."""
    bottom, top = axes.get_ylim()
    top = max(min(top, 1.02 * most), 1.0)
    axes.set_ylim(max(bottom, -0.02 * top), top)


def _label(axes: Axes, lines: Sequence[_Line], ends: Sequence[float]) -> None:
    """Writes the lines' names to the right of the axes, each as near to its line's end as the
    others allow.
    """
    # Imported here: scipy takes long to import, and --help does not need it.
    from scipy.optimize import isotonic_regression

    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    axes.set(xlim=(left, right), ylim=(bottom, top))
    gap = (top - bottom) * LABEL_POINTS / AXES_POINTS
    wanted = np.array([line.points[max(line.points)].score for line in lines])
    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(len(lines))
    placed = isotonic_regression(wanted[order] - steps).x + steps
    # The whole column is moved where it would leave the figure.
    placed += min(0.0, top - placed[-1]) + max(0.0, bottom - placed[0])
    column = right + 0.035 * (right - left)
    for number, height in zip(order, placed, strict=True):
        line = lines[number]
        axes.plot(
            [ends[number], right, column],
            [wanted[number], wanted[number], height],
            color=line.colour,
            linewidth=0.6,
            linestyle=(0, (1, 2)),
            clip_on=False,
            zorder=1,
        )
        axes.text(
            column + 0.01 * (right - left),
            height,
            line.label,
            color=line.colour,
            fontsize=8.5 if line.own else 8,
            fontweight="bold" if line.own else "normal",
            verticalalignment="center",
        )
