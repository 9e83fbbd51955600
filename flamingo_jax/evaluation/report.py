"""report.json and report.html: one file that a person opens, with images, predictions, curves
and tables inside it.
"""

import html
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from flamingo_jax.evaluation.benchmarks.benchmark import BenchmarkResult, Prediction
from flamingo_jax.web_page import Table, page, strip, table

PREDICTIONS_SHOWN = 12
"""Shown of each result."""
IMAGE_SIDE = 112


def write_report(
    folder: pathlib.Path,
    report: Mapping[str, Any],
    *,
    title: str,
    tables: Sequence[Table],
    results: Sequence[tuple[str, BenchmarkResult]],
    training: Mapping[str, Sequence[Mapping[str, Any]]],
    lines: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]] | None = None,
) -> None:
    """Writes `report.json` (`report` as it is) and `report.html` into `folder`.

    Args:
      results: what to show predictions of, each with its heading.
      training: {stage: lines of its metrics.jsonl}, for the curves of losses and the gates by
        layer.
      lines: further charts, {title: {name of a line: (x, y)}}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    charts = [chart(name, series) for name, series in (lines or {}).items()]
    for stage, measured in training.items():
        charts += training_charts(stage, measured)
    parts = [*map(table, tables)]
    if charts:
        parts.append(f'<h2>Curves</h2><div class="charts">{"".join(charts)}</div>')
    parts += [_predictions(heading, result) for heading, result in results]
    (folder / "report.html").write_text(page(title, parts))


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, none where there is no file; a last line that was cut short
    is left out.
    """
    measured = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            measured.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return measured


def training_charts(stage: str, measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """Training losses, held-out losses with and without images, and the last gates by layer,
    as far as they were measured.
    """

    def series(names: Sequence[str]) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
        found = {
            name: [(line["step"], line[name]) for line in measured if _is_number(line.get(name))]
            for name in names
        }
        return {name: tuple(zip(*points, strict=True)) for name, points in found.items() if points}  # type: ignore[misc]

    names = sorted({name for line in measured for name in line})
    losses = series([name for name in names if name == "loss" or name.startswith("loss/")])
    held_out = series([name for name in names if name.startswith("held_out/") and "loss" in name])
    charts = []
    if losses:
        charts.append(chart(f"{stage}: training loss", losses, x="step", y="loss"))
    if held_out:
        charts.append(chart(f"{stage}: held-out loss", held_out, x="step", y="loss"))
    gates = last_gates(measured)
    if gates:
        lines = {name: (range(1, len(values) + 1), values) for name, values in gates.items()}
        charts.append(
            chart(f"{stage}: tanh of the gates by layer", lines, x="gated block", y="tanh(gate)")
        )
    return charts


def last_gates(measured: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """{"attention": [tanh of each block's gate], "dense": ...} as last measured; empty where
    there are none.
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


def chart(
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str = "",
    y: str = "",
) -> str:
    """Lines over numbers as an SVG element."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, (places, values) in series.items():
        axes.plot(
            list(places),
            list(values),
            label=name,
            marker="o" if len(values) < 12 else None,
            markersize=4,
        )
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :]


def image(prediction: Prediction) -> str:
    """The visual of a prediction as a data URI: an image, or the frames of a clip side by side."""
    return strip(prediction.visual.frames, IMAGE_SIDE)


def _predictions(heading: str, result: BenchmarkResult) -> str:
    # The first ones, and then some of the wrong ones, which teach more.
    half = PREDICTIONS_SHOWN // 2
    wrong = [one for one in result.predictions[half:] if one.score < 0.5][
        : PREDICTIONS_SHOWN - half
    ]
    cards = "".join(map(_card, result.predictions[:half] + wrong))
    summary = f"{100 * result.accuracy:.1f} % of {len(result.predictions)}"
    return f'<h2>{html.escape(heading)}: {summary}</h2><div class="samples">{cards}</div>'


def _card(prediction: Prediction) -> str:
    prompt = prediction.prompt if len(prediction.prompt) <= 160 else "… " + prediction.prompt[-160:]
    return (
        f'<div class="sample{" right" if prediction.score >= 0.5 else ""}"><img'
        f' src="{image(prediction)}" alt="">'
        "<div"
        f' class="prompt">{html.escape(prompt)}</div><div><b>{html.escape(prediction.text) or "(nothing)"}</b></div>'  # noqa: E501
        f"<div>should be: {html.escape(' | '.join(sorted(set(prediction.answers))))}</div></div>"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
