"""Makes self-contained HTML pages with tables and images; all text is escaped."""

import base64
import dataclasses
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

FRAMES = 4
"""The most frames of a clip that are shown."""
GAP = 1 / 32
"""The space between two frames, as a share of their height."""
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem;
  padding: 0 1rem; color: #223; background: #fff }
h1, h2, h3 { line-height: 1.2; margin: 1.6em 0 .5em } h1 { margin-top: .6em }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem }
.sample { border: 1px solid #ddd; border-left: 5px solid #c33; border-radius: 4px;
  padding: .6rem; font-size: 13px; overflow-wrap: anywhere }
.sample.right { border-left-color: #2a8 } .prompt { color: #777 }
.sample img { image-rendering: pixelated; max-width: 100%; display: block; margin-bottom: .4rem }
.charts { display: flex; flex-wrap: wrap; gap: 1rem }
.charts svg { width: 34rem; max-width: 100%; height: auto }
"""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells; numbers between 0 and 1 are shown in per cent, other values as they are."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


def page(title: str, parts: Iterable[str], *, style: str = "") -> str:
    """Makes an HTML document from a title and elements; `style` is added to the default CSS."""
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def table(table: Table) -> str:
    """Makes the HTML of a table, with its title as a heading."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell(value))}</td>" for value in row) + "</tr>"
        for row in table.rows
    )
    return (
        f"<h2>{html.escape(table.title)}</h2>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def cell(value: Any) -> str:
    """Formats a table's value: shares in per cent, None as a dash."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if isinstance(value, float) and 0 <= value <= 1 else str(value)


def strip(frames: Sequence[np.ndarray] | np.ndarray, height: int, form: str = "PNG") -> str:
    """Makes a data URI of an image, or of at most FRAMES of a clip's frames side by side, with
    white between them: uint8 [H, W, 3] each, of one shape.
    """
    if len(frames) > FRAMES:
        frames = [
            frames[place] for place in np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)
        ]
    parts = list(frames)
    tall = parts[0].shape[0]
    gap = np.full((tall, max(1, round(tall * GAP)), 3), 255, np.uint8)
    spaced = [part for frame in parts for part in (gap, frame)][1:]
    whole = Image.fromarray(np.concatenate(spaced, axis=1))
    scale = height / whole.height
    whole = whole.resize(
        (max(1, round(whole.width * scale)), height),
        Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC,
    )
    buffer = io.BytesIO()
    whole.save(buffer, format=form, optimize=True)
    return f"data:image/{form.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()
