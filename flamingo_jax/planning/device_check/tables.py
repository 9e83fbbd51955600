"""Lays out the results of a device check for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

GIB = 2**30


def section_table(name: str, found: Mapping[str, Any]) -> Table:
    """Lays out the results of one section, as `sections.run_sections` returns them."""
    title = f"{name}: {found['status']} in {found['seconds']:.0f} s"
    table = Table("", title=title, caption=found.get("error"))
    table.add_column("", justify="right")
    for label, value in _rows("", found["results"]):
        table.add_row(label, value)
    return table


def _rows(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yields (label, text) of every leaf of the results; lists of operations one a row."""
    if isinstance(value, Mapping) and "name" in value and "milliseconds" in value:
        yield f"  {value['name'][:60]}", f"{value['milliseconds']:.2f} ms, {value['share']:.1%}"
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _rows(f"{prefix} {key}".strip(), inner)
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for inner in value:
            yield from _rows(prefix, inner)
    else:
        yield prefix.replace("_", " "), _text(prefix, value)


def _text(name: str, value: Any) -> str:
    """Writes a value in the unit that its name tells."""
    if isinstance(value, list):
        return ", ".join(_text(name, one) for one in value) or "none"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    if name.endswith("_bytes"):
        return f"{value / GIB:.2f} GiB"
    if name.endswith(("mfu", "share")):
        return f"{value:.1%}"
    if name.endswith("rate") or name.endswith("flops"):
        return f"{value / 1e12:,.3f} T"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
