"""Writes report.html and report.md of a suite: every benchmark at every number of shots, beside
published figures, with what was run and samples.

Both are made of the files in OUTPUT/results and OUTPUT/predictions alone; the page shows images
where the caller can give them.
"""

import html
import pathlib
from collections.abc import Mapping, Sequence

from flamingo_jax.evaluation.results.markup import html_table, markdown_table
from flamingo_jax.evaluation.results.published import PUBLISHED
from flamingo_jax.evaluation.results.result_file import PAPER_SCALE, CellResult
from flamingo_jax.evaluation.results.samples import Sample, VisualOf, choose_samples, shown_cell
from flamingo_jax.evaluation.results.score_table import ScoreRow, rows_of, summarise_seeds
from flamingo_jax.evaluation.results.shot_chart import published_beside, shot_chart
from flamingo_jax.evaluation.results.what_was_run import RunSection, what_was_run
from flamingo_jax.paths import make_folder
from flamingo_jax.web_page import page, strip

TITLE = "Few-shot benchmarks"
SCALE_NOTE = (
    "Scores are on the papers' scale: CIDEr times 100, all else in per cent; ± is half of the 95 %"
    " interval, or the standard deviation over several seeds. “Shots without images” is the"
    " control: the same shots with their images taken away, while the query keeps its own. What a"
    " score gains over it, it learned from the images of the shots."
)
PUBLISHED_NOTE = (
    "Published figures are of other protocols and training data: marks to look at, not a ranking."
)
CONTROL = "shots without images"
ON_WHITE = '<svg style="background: white" '
"""How a chart begins that stands alone: viewers may have a dark ground."""
IMAGE_SIDE = 144
PROMPT_CHARACTERS = 220
STYLE = """
.scores td { vertical-align: top } .scores td:nth-child(n+2):not(:nth-last-child(-n+2)) {
  font-weight: 650; color: #0072b2 }
td small { display: block; font-weight: 400; color: #778; font-size: .8rem }
.note { color: #667; max-width: 60rem }
.benchmark { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; align-items: flex-start;
  border-top: 1px solid #dde1e8; padding: 1rem 0 }
.benchmarks { display: flex; flex-wrap: wrap; gap: 0 1rem }
.benchmarks > .benchmark { flex: 1 1 100% } .benchmarks > .alone { flex: 0 1 34.5rem }
.benchmark svg { width: 40rem; max-width: 100%; height: auto }
.beside { font-size: .82rem; margin: 1.2rem 0 } .beside td, .beside th { padding: .1rem .5rem }
.own1 tr:nth-child(-n+1) td, .own2 tr:nth-child(-n+2) td, .own3 tr:nth-child(-n+3) td {
  color: #0072b2; font-weight: 650 }
details { border-top: 1px solid #dde1e8; padding: .5rem 0 } summary { cursor: pointer }
summary h3 { display: inline; margin: 0; font-size: 1.02rem } summary span { color: #667 }
.samples { margin: .8rem 0 } .sample img { image-rendering: auto; border-radius: 3px }
.sample b { font-size: 14px } .sample .score { float: right; margin-left: .6rem;
  color: #667 }
.run { font-size: .85rem } .run th, .run td { text-align: left; overflow-wrap: anywhere }
"""


def write_suite_report(
    output: pathlib.Path,
    results: Sequence[CellResult],
    *,
    visuals: Mapping[str, VisualOf] | None = None,
) -> None:
    """Writes report.html and report.md into an output folder, and charts/<benchmark>.svg.

    Args:
      output: the folder with the predictions that the results name.
      results: as `result_file.read_results` reads them.
      visuals: {benchmark: id of a query -> its image or clip}; samples of other benchmarks are
        shown without.
    """
    rows = rows_of(results)
    charts = {some[0].first.benchmark: shot_chart(some) for some in _by_benchmark(rows)}
    (output / "report.md").write_text(_markdown(rows))
    (output / "report.html").write_text(_page(output, rows, charts, visuals or {}))
    make_folder(output / "charts")
    for name, chart in charts.items():
        if chart:
            (output / "charts" / f"{name}.svg").write_text(chart.replace("<svg ", ON_WHITE, 1))


def score_cells(rows: Sequence[ScoreRow]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and rows of the table of scores; a control is a cell's second line."""
    shots = sorted({number for row in rows for number in row.shots})
    several = {row.first.benchmark for row in rows if row.selection not in ("", "random")}
    header = ["shots", *map(str, shots), "queries", "missing"]
    cells = []
    for row in rows:
        what = [row.first.headline, row.first.split]
        what += [row.selection] if row.first.benchmark in several else []
        name = f"{row.first.title}\n{', '.join(filter(None, what))}"
        scores = [_score(row, number) for number in shots]
        cells.append([name, *scores, row.queries, f"{row.missing:,}"])
    return header, cells


def _score(row: ScoreRow, shots: int) -> str:
    lines = []
    if shots in row.runs:
        lines.append(str(summarise_seeds(row.runs[shots])))
    if shots in row.controls:
        lines += [] if lines else ["–"]
        lines.append(f"{CONTROL} {summarise_seeds(row.controls[shots])}")
    return "\n".join(lines) or "–"


def _markdown(rows: Sequence[ScoreRow]) -> str:
    """Writes the report in Markdown: the tables, without charts and samples."""
    parts = [f"# {TITLE}", _headline(rows), markdown_table(*score_cells(rows)), SCALE_NOTE]
    beside = [
        f"### {some[0].first.title}\n\n{markdown_table(*found)}"
        for some in _by_benchmark(rows)
        if len((found := beside_cells(some))[1]) > len(some)
    ]
    if beside:
        parts += ["## Beside published figures", PUBLISHED_NOTE, *beside]
    parts.append("## What was run")
    for heading, header, lines in _sections(rows):
        parts += [f"### {heading}", markdown_table(header, lines)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _page(
    output: pathlib.Path,
    rows: Sequence[ScoreRow],
    charts: Mapping[str, str],
    visuals: Mapping[str, VisualOf],
) -> str:
    """Writes the report as an HTML page; charts are by benchmark."""
    parts = [
        f'<p class="note">{html.escape(_headline(rows))}</p>',
        html_table(*score_cells(rows), style="scores"),
        f'<p class="note">{html.escape(SCALE_NOTE)}</p>',
        "<h2>By the number of shots</h2>",
        *_charts(_by_benchmark(rows), charts),
    ]
    shown = [
        _samples(output, row, visuals.get(row.first.benchmark), opened=not number)
        for number, row in enumerate(rows)
    ]
    if any(shown):
        parts += ["<h2>What it answers, failures first</h2>", *shown]
    parts.append("<h2>What was run</h2>")
    for number, (heading, header, lines) in enumerate(_sections(rows)):
        parts.append(
            f"<details{'' if number else ' open'}><summary><h3>{html.escape(heading)}</h3>"
            f"</summary>{html_table(header, lines, style='run')}</details>"
        )
    return page(TITLE, parts, style=STYLE)


def _charts(groups: Sequence[Sequence[ScoreRow]], drawn: Mapping[str, str]) -> list[str]:
    """Writes the charts: each with its table where there are published figures, the others side
    by side.
    """
    note, charts = False, []
    for some in groups:
        chart = f"<div>{drawn[some[0].first.benchmark]}</div>"
        if published_beside(some):
            note = True
            table = html_table(*beside_cells(some), style=f"beside own{min(len(some), 3)}")
            charts.append(f'<div class="benchmark">{chart}{table}</div>')
        elif drawn[some[0].first.benchmark]:
            charts.append(f'<div class="benchmark alone">{chart}</div>')
    told = [f'<p class="note">{html.escape(PUBLISHED_NOTE)}</p>'] if note else []
    return [*told, f'<div class="benchmarks">{"".join(charts)}</div>']


def beside_cells(rows: Sequence[ScoreRow]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and rows of a benchmark's table beside published figures."""
    published = published_beside(rows)
    shots = sorted(
        {n for row in rows for n in row.shots} | {n for p in published.values() for n in p}
    )
    cells = []
    for row in rows:
        name = f"this model, {row.selection}" if len(rows) > 1 else "this model"
        scores = [
            f"{summarise_seeds(row.runs[n]).score:.1f}" if n in row.runs else "–" for n in shots
        ]
        cells.append([name, *scores])
    for name, figures in published.items():
        cells.append([name, *(f"{figures[n]:.1f}" if n in figures else "–" for n in shots)])
    return ["shots", *map(str, shots)], cells


def _sections(rows: Sequence[ScoreRow]) -> list[RunSection]:
    """Returns the tables on what was run, and on where published figures are from."""
    sources: dict[str, list[str]] = {}
    for some in _by_benchmark(rows):
        for name in published_beside(some):
            models = sources.setdefault(PUBLISHED[name].source, [])
            models += [] if name in models else [name]
    lines = [[", ".join(models), source] for source, models in sources.items()]
    found = what_was_run(rows)
    return (
        [*found, RunSection("Published figures", ["models", "source"], lines)] if lines else found
    )


def _by_benchmark(rows: Sequence[ScoreRow]) -> list[list[ScoreRow]]:
    groups: dict[str, list[ScoreRow]] = {}
    for row in rows:
        groups.setdefault(row.first.benchmark, []).append(row)
    return list(groups.values())


def _headline(rows: Sequence[ScoreRow]) -> str:
    """Says in a sentence which model was run on how much."""
    cells = {cell.name: cell for row in rows for cell in row.cells}.values()
    models = dict.fromkeys(
        f"{cell.model.get('folder')} ({str(cell.model.get('digest'))[:12]})" for cell in cells
    )
    seconds = sum(cell.seconds for cell in cells)
    time = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    return (
        f"{', '.join(models)}: {len(cells)} runs of {len(_by_benchmark(rows))} benchmarks,"
        f" {sum(cell.n for cell in cells):,} answers in {time}."
    )


def _samples(output: pathlib.Path, row: ScoreRow, visual_of: VisualOf | None, opened: bool) -> str:
    """Writes the HTML of some predictions of a row's run with most shots."""
    cell = shown_cell(row)
    samples = choose_samples(output, cell)
    if not samples:
        return ""
    cards = "".join(_card(sample, visual_of) for sample in samples)
    what = [f"{cell.shots} shots", *([cell.selection] if cell.selection else [])]
    told = ", ".join([*what, str(summarise_seeds([cell]))])
    return (
        f"<details{' open' if opened else ''}><summary><h3>{html.escape(cell.title)}</h3>"
        f" <span>{html.escape(told)}</span></summary>"
        f'<div class="samples">{cards}</div></details>'
    )


def _card(sample: Sample, visual_of: VisualOf | None) -> str:
    """Writes the HTML of one prediction."""
    one = sample.prediction
    visual = visual_of(one.id) if visual_of else None
    image = (
        "" if visual is None else f'<img src="{strip(visual.frames, IMAGE_SIDE, "JPEG")}" alt="">'
    )
    # The shots are the same for many queries: only the query's own part of the prompt is shown.
    query = one.prompt.rpartition("<image>")[2].strip()[-PROMPT_CHARACTERS:]
    score = "" if sample.score is None else f"score {PAPER_SCALE * sample.score:.0f}"
    kind = "sample right" if sample.score is not None and sample.score >= 0.5 else "sample"
    truths = html.escape(" | ".join(dict.fromkeys(one.answers)))
    return (
        f'<div class="{kind}">{image}<span class="score">{score}</span>'
        f'<div class="prompt">{html.escape(query)}</div>'
        f"<div><b>{html.escape(one.text) or '(nothing)'}</b></div>"
        f"<div>should be: {truths}</div></div>"
    )
