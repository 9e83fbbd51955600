"""Tables in Markdown and HTML."""

import html
import re
from collections.abc import Sequence

NUMBER = re.compile(r"-?[\d,]+(\.\d+)?(?![\w.])|–|not scored")
"""How a cell of numbers begins; a digest and a version do not."""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes a table; lines of a cell are separated by "\\n". Columns of numbers are aligned to
    the right.
    """

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_markdown_cell(text) for text in cells) + " |"

    numbers = [all(NUMBER.match(row[place]) for row in rows) for place in range(len(header))]
    rules = ["---:" if place and number else "---" for place, number in enumerate(numbers)]
    rule = f"| {' | '.join(rules)} |"
    return "\n".join([line(header), rule, *map(line, rows)]) + "\n"


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    """Writes a table; the first line of a cell is its value, further ones are small.

    style: CSS classes.
    """
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{_html_cell(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    attribute = f' class="{html.escape(style)}"' if style else ""
    return f"<table{attribute}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _markdown_cell(text: str) -> str:
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    return text.replace("|", "\\|").replace("\n", "<br>")


def _html_cell(text: str) -> str:
    # A score is not parted from its error at the end of a line.
    text = text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    first, *further = (html.escape(line) for line in text.split("\n"))
    return first + "".join(f"<small>{line}</small>" for line in further)
