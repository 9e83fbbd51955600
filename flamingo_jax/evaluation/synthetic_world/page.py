"""Writes report.json and report.html, a self-contained page with images, predictions, training
curves and tables.
"""

import dataclasses
import html
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from flamingo_jax.evaluation.charts import Series, chart, training_charts
from flamingo_jax.evaluation.media import Preprocessing
from flamingo_jax.evaluation.protocol.benchmark import BenchmarkResult, Prediction
from flamingo_jax.web_page import Table, page, strip, table

PREDICTIONS_SHOWN = 12
"""How many predictions of each benchmark the page shows."""
IMAGE_SIDE = 112
STYLE = """
.highlights { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)) }
.highlight { background: #f5f7fa; border-radius: 8px; padding: .9rem 1.1rem }
.highlight b { display: block; font-size: 2rem; line-height: 1.2; font-weight: 650; color: #0072b2 }
.bar { position: relative; height: 8px; border-radius: 4px; background: #dde1e8; margin: .45rem 0 }
.bar i { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: #0072b2 }
.bar s { position: absolute; top: -3px; bottom: -3px; width: 3px; background: #d55e00 }
.highlight small { color: #667 } .highlight small em { color: #d55e00; font-style: normal }
details { border-top: 1px solid #dde1e8; padding: .5rem 0 } summary { cursor: pointer }
summary h3 { display: inline; margin: 0; font-size: 1.02rem } summary span { color: #667 }
details .samples { margin: .8rem 0 } .sample img { border-radius: 3px }
.tables { display: flex; flex-wrap: wrap; gap: 0 3.5rem } .tables h2 { font-size: 1.05rem }
.charts svg { background: #fff } section { margin-bottom: 2.2rem }
"""


@dataclasses.dataclass(frozen=True)
class Highlight:
    """A metric shown at the top of the page.

    value: from 0 to 1.
    compared_with, compared: the name and value of a baseline; None for no baseline.
    """

    name: str
    value: float
    compared_with: str = ""
    compared: float | None = None


def write_report(
    folder: pathlib.Path,
    report: Mapping[str, Any],
    *,
    title: str,
    tables: Sequence[Table],
    results: Sequence[tuple[str, BenchmarkResult]],
    how: Preprocessing,
    training: Mapping[str, Sequence[Mapping[str, Any]]],
    highlights: Sequence[Highlight] = (),
    lines: Mapping[str, Mapping[str, Series]] | None = None,
) -> None:
    """Writes `report.json` and `report.html` into `folder`; of several processes, which have
    the same results, only the first one does.

    Args:
      report: the content of report.json.
      results: the benchmarks of which predictions are shown, as (heading, result).
      how: the model's preprocessing of the images that are shown.
      training: {stage: lines of its metrics.jsonl}, drawn as loss curves and gates by layer.
      highlights: metrics at the top of the page.
      lines: charts of accuracy by number of shots, {title: {line: (x, y)}}.
    """
    if jax.process_index():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    charts = [
        chart(name, series, x="shots", percent=True, log2_x=True)
        for name, series in (lines or {}).items()
    ]
    for stage, measured in training.items():
        charts += training_charts(stage, measured)
    parts = []
    if highlights:
        parts.append(
            f'<section class="highlights">{"".join(map(_highlight, highlights))}</section>'
        )
    if results:
        shown = "".join(
            _predictions(heading, result, how, opened=not number)
            for number, (heading, result) in enumerate(results)
        )
        parts.append(f"<section><h2>What it answers</h2>{shown}</section>")
    if charts:
        parts.append(
            f'<section><h2>Curves</h2><div class="charts">{"".join(charts)}</div></section>'
        )
    shown = "".join(f"<div>{table(one)}</div>" for one in tables)
    parts.append(f'<section><h2>In numbers</h2><div class="tables">{shown}</div></section>')
    (folder / "report.html").write_text(page(title, parts, style=STYLE))


def image(prediction: Prediction, how: Preprocessing) -> str:
    """Returns a prediction's visual as a data: URI: the image, or a clip's frames side by
    side.
    """
    assert prediction.media is not None
    return strip(prediction.media.read(how).frames, IMAGE_SIDE)


def _highlight(one: Highlight) -> str:
    """Writes the HTML of one highlight, a number with a bar."""
    mark = note = ""
    if one.compared is not None:
        mark = f'<s style="left: calc({100 * one.compared:.1f}% - 1px)"></s>'
        note = (
            f"<small><em>{100 * one.compared:.0f} %</em> {html.escape(one.compared_with)}</small>"
        )
    return (
        f'<div class="highlight">{html.escape(one.name)}<b>{100 * one.value:.0f} %</b>'
        f'<div class="bar"><i style="width: {100 * one.value:.1f}%"></i>{mark}</div>{note}</div>'
    )


def _predictions(heading: str, result: BenchmarkResult, how: Preprocessing, opened: bool) -> str:
    """Writes the HTML of some predictions of one benchmark."""
    # Half are simply the first predictions, half are wrong ones, which tell a reader more.
    half = PREDICTIONS_SHOWN // 2
    wrong = [one for one in result.predictions[half:] if one.score < 0.5]
    chosen = result.predictions[:half] + wrong[: PREDICTIONS_SHOWN - half]
    cards = "".join(_card(one, how) for one in chosen)
    summary = f"{100 * result.accuracy:.1f} % of {len(result.predictions)}"
    return (
        f"<details{' open' if opened else ''}><summary><h3>{html.escape(heading)}</h3>"
        f' <span>{summary}</span></summary><div class="samples">{cards}</div></details>'
    )


def _card(prediction: Prediction, how: Preprocessing) -> str:
    """Writes the HTML of one prediction."""
    prompt = prediction.prompt
    shown = prompt if len(prompt) <= 160 else "… " + prompt[-160:]
    kind = "sample right" if prediction.score >= 0.5 else "sample"
    truths = html.escape(" | ".join(sorted(set(prediction.answers))))
    return (
        f'<div class="{kind}"><img src="{image(prediction, how)}" alt="">'
        f'<div class="prompt">{html.escape(shown)}</div>'
        f"<div><b>{html.escape(prediction.text) or '(nothing)'}</b></div>"
        f"<div>should be: {truths}</div></div>"
    )
