"""Line charts as SVG for the report: accuracy by shots, losses and gates of training."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Series = tuple[Sequence[float], Sequence[float]]
"""The x and y values of a line."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#b8a800")
"""The colour-blind-safe palette of Okabe and Ito, with its black as grey and its yellow
darker.
"""
INK, FAINT = "#334", "#dde1e8"
SMOOTHED_OVER = 40
"""A line of more points than this is drawn faint, with its running median over it."""
STYLE: Any = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
}
FRACTION_METRICS = ("recall@", "/top_", "/accuracy@")
"""Substrings of the names of evaluators' metrics that are fractions from 0 to 1."""
LEGEND_CHARACTERS = 76
"""Width of a row of the legend, in characters of names and line samples."""


def chart(
    title: str,
    series: Mapping[str, Series],
    *,
    x: str = "",
    y: str = "",
    integer_ticks: bool = False,
    log2_x: bool = False,
    percent: bool = False,
) -> str:
    """Draws a line chart as an SVG element, with the legend below the axes.

    Args:
      series: {name: (x, y)}. A name "model, variant" is drawn in the colour of "model",
        dashed.
      x, y: labels of the axes.
      whole_numbers: put ticks at integers only.
      doubling: logarithmic x axis with a tick at each value.
      percent: y are fractions from 0 to 1, labelled 0 to 100 %.
    """
    kinds = list(dict.fromkeys(name.partition(", ")[0] for name in series))
    with matplotlib.rc_context(STYLE):
        rows = _legend_rows(list(series)) if len(series) > 1 else 0
        figure = Figure(figsize=(6.4, 3.4 + 0.24 * rows), layout="constrained")
        axes = figure.add_subplot()
        for name, (places, values) in series.items():
            kind, _, variant = name.partition(", ")
            look = {
                "color": COLOURS[kinds.index(kind) % len(COLOURS)],
                "linestyle": (0, (4, 2)) if variant else "solid",
                **({"markerfacecolor": "white"} if variant else {}),
            }
            _draw(axes, name, np.asarray(places), np.asarray(values), look)
        axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
        axes.set(xlabel=x, ylabel=y)
        axes.grid(color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=integer_ticks))
        if log2_x:
            axes.set_xscale("log", base=2)
            ticks = sorted({place for places, _ in series.values() for place in places})
            axes.set_xticks(ticks, map(str, ticks))
        elif x == "step":
            axes.set_xlim(left=0)
        if percent:
            axes.set_ylim(0, 1.04)
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        if rows:
            columns = math.ceil(len(series) / rows)
            figure.legend(
                loc="outside lower left", ncols=columns, frameon=False, fontsize=9, handlelength=1.4
            )
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :]


def training_charts(stage: str, measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """Draws a stage's training losses, held-out losses with and without images, evaluators'
    metrics and final gates by layer, as far as its metrics.jsonl has them.

    Args:
      measured: the lines of a metrics.jsonl.
    Returns: SVG elements.
    """
    names = sorted({name for line in measured for name in line})
    charts = []
    losses = _series(measured, [n for n in names if n == "loss" or n.startswith("loss/")])
    if len(losses) == 2 and "loss" in losses:
        # With one dataset the total loss and the dataset's are the same curve.
        losses = {"loss": losses["loss"]}
    if losses:
        labels = {name: name.removeprefix("loss/") for name in losses}
        labels["loss"] = "all datasets"
        title = f"{stage}: training loss"
        charts.append(chart(title, _renamed(losses, labels), x="step", y="loss"))
    held_out = _series(
        measured, [n for n in names if n.startswith("held_out/") and "loss_per_token" in n]
    ) or _series(measured, [n for n in names if n.startswith("held_out/") and "loss" in n])
    if held_out:
        labels = {name: _held_out_label(name) for name in held_out}
        y = "loss a token" if any("per_token" in name for name in held_out) else "loss"
        charts.append(chart(f"{stage}: held-out loss", _renamed(held_out, labels), x="step", y=y))
    shares = _series(measured, [n for n in names if any(mark in n for mark in FRACTION_METRICS)])
    if shares:
        charts.append(chart(f"{stage}: evaluators", shares, x="step", percent=True))
    gates = last_gates(measured)
    if gates:
        lines: dict[str, Series] = {
            name: (range(1, len(values) + 1), values) for name, values in gates.items()
        }
        title = f"{stage}: how far the gates are open"
        charts.append(chart(title, lines, x="gated block", y="tanh(gate)", integer_ticks=True))
    return charts


def last_gates(measured: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Returns the last logged gates, {"attention": [tanh(gate) of each block], "dense": ...};
    {} where none were logged.
    """
    for line in reversed(measured):
        gates = {
            name.removeprefix("gates/"): list(value)
            for name, value in line.items()
            if name.startswith("gates/")
        }
        if gates:
            return gates
    return {}


def _draw(axes: Axes, name: str, x: np.ndarray, y: np.ndarray, look: dict[str, Any]) -> None:
    if len(y) > SMOOTHED_OVER:
        axes.plot(x, y, alpha=0.25, linewidth=0.9, **look)
        axes.plot(x, _running_median(y), label=name, linewidth=1.8, **look)
        return
    marker = "o" if len(y) < 12 else None
    axes.plot(x, y, label=name, linewidth=1.8, marker=marker, markersize=4.5, **look)


def _running_median(y: np.ndarray) -> np.ndarray:
    """Computes a centred running median, over fewer points at the ends: unlike a moving
    average it has no lag and ignores spikes.
    """
    reach = max(2, len(y) // SMOOTHED_OVER)
    return np.array(
        [np.median(y[max(0, place - reach) : place + reach + 1]) for place in range(len(y))]
    )


def _legend_rows(names: Sequence[str]) -> int:
    """Computes the rows of a legend whose columns are as wide as the longest name."""
    columns = max(1, LEGEND_CHARACTERS // (max(map(len, names)) + 6))
    return math.ceil(len(names) / columns)


def _series(measured: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Series]:
    found: dict[str, Series] = {}
    for name in names:
        points = [(line["step"], line[name]) for line in measured if _is_number(line.get(name))]
        if points:
            found[name] = ([step for step, _ in points], [value for _, value in points])
    return found


def _renamed(series: Mapping[str, Series], labels: Mapping[str, str]) -> dict[str, Series]:
    return {labels[name]: points for name, points in series.items()}


def _held_out_label(name: str) -> str:
    """Writes a held-out metric's label: its dataset, and whether images were removed."""
    what, _, metric = name.removeprefix("held_out/").rpartition("/")
    blind = metric.endswith("_without_images") or metric.endswith("_without_pictures")
    return f"{what or 'all datasets'}{', without images' if blind else ''}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
