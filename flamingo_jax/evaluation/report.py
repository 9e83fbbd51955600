"""report.json and report.html: one file that a person opens, with pictures, predictions, curves and tables inside it."""

import base64
import dataclasses
import html
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from flamingo_jax.evaluation.benchmarks import Result, Sample

SAMPLES = 12
"""Samples shown of each result."""
PICTURE_SIDE = 112
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; background: #fff }
h1, h2, h3 { line-height: 1.2; margin: 1.6em 0 .5em }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem }
.sample { border: 1px solid #ddd; border-left: 5px solid #c33; border-radius: 4px; padding: .6rem; font-size: 13px; overflow-wrap: anywhere }
.sample.right { border-left-color: #2a8 } .sample img { image-rendering: pixelated; max-width: 100%; display: block; margin-bottom: .4rem }
.prompt { color: #777 } .charts { display: flex; flex-wrap: wrap; gap: 1rem } .charts svg { width: 34rem; max-width: 100%; height: auto }
"""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells; numbers between 0 and 1 are shown in per cent, other values as they are."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


def write_report(
    folder: pathlib.Path,
    report: Mapping[str, Any],
    *,
    title: str,
    tables: Sequence[Table],
    results: Sequence[tuple[str, Result]],
    training: Mapping[str, Sequence[Mapping[str, Any]]],
    lines: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]] | None = None,
) -> None:
    """Writes `report.json` (`report` as it is) and `report.html` into `folder`.

    Args:
      results: what to show samples of, each with its heading.
      training: {stage: lines of its metrics.jsonl}, for the curves of losses and the gates by layer.
      lines: further charts, {title: {name of a line: (x, y)}}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    charts = [chart(name, series) for name, series in (lines or {}).items()]
    for stage, measured in training.items():
        charts += training_charts(stage, measured)
    parts = [f"<h1>{html.escape(title)}</h1>", *map(_table, tables)]
    if charts:
        parts.append(f'<h2>Curves</h2><div class="charts">{"".join(charts)}</div>')
    parts += [_samples(heading, result) for heading, result in results]
    page = "\n".join(parts)
    (folder / "report.html").write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body>\n{page}\n</body></html>\n"
    )


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, none where there is no file; a last line that was cut short is left out."""
    measured = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            measured.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return measured


def training_charts(stage: str, measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """Training losses, held-out losses with and without pictures, and the last gates by layer, as far as they were measured."""

    def series(names: Sequence[str]) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
        found = {name: [(line["step"], line[name]) for line in measured if _is_number(line.get(name))] for name in names}
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
        charts.append(chart(f"{stage}: tanh of the gates by layer", lines, x="gated block", y="tanh(gate)"))
    return charts


def last_gates(measured: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """{"attention": [tanh of each block's gate], "dense": ...} as last measured; empty where there are none."""
    for line in reversed(measured):
        gates = {name.removeprefix("gates/"): list(value) for name, value in line.items() if name.startswith("gates/")}
        if gates:
            return gates
    return {}


def chart(title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x: str = "", y: str = "") -> str:
    """Lines over numbers as an SVG element."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, (places, values) in series.items():
        axes.plot(list(places), list(values), label=name, marker="o" if len(values) < 12 else None, markersize=4)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :]


def picture(sample: Sample) -> str:
    """The visual of a sample as a data URI: a picture, or the frames of a clip side by side."""
    frames = sample.visual.frames
    if len(frames) > 4:
        frames = frames[np.linspace(0, len(frames) - 1, 4).round().astype(int)]
    strip = Image.fromarray(np.concatenate(list(frames), axis=1))
    scale = PICTURE_SIDE / strip.height
    strip = strip.resize((round(strip.width * scale), PICTURE_SIDE), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    strip.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _samples(heading: str, result: Result) -> str:
    # The first ones, and then some of the wrong ones, which teach more.
    half = SAMPLES // 2
    wrong = [sample for sample in result.samples[half:] if sample.right < 0.5][: SAMPLES - half]
    cards = "".join(map(_card, result.samples[:half] + wrong))
    summary = f"{100 * result.accuracy:.1f} % of {len(result.samples)}"
    return f'<h2>{html.escape(heading)}: {summary}</h2><div class="samples">{cards}</div>'


def _card(sample: Sample) -> str:
    prompt = sample.prompt if len(sample.prompt) <= 160 else "… " + sample.prompt[-160:]
    return (
        f'<div class="sample{" right" if sample.right >= 0.5 else ""}"><img src="{picture(sample)}" alt="">'
        f'<div class="prompt">{html.escape(prompt)}</div><div><b>{html.escape(sample.prediction) or "(nothing)"}</b></div>'
        f"<div>should be: {html.escape(' | '.join(sorted(set(sample.answers))))}</div></div>"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(_cell(cell))}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<h2>{html.escape(table.title)}</h2><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if isinstance(value, float) and 0 <= value <= 1 else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
