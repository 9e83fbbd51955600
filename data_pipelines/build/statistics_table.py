"""Formats the statistics of built datasets as a table for the terminal."""

from typing import Any

from rich.table import Table


def statistics_table(made: dict[str, tuple[dict[str, Any], bool]]) -> Table:
    """Makes a table with one row per dataset of {name: (statistics, whether it was built
    now)}.
    """
    heads = ["dataset", "records read", "used", "in splits", "dropped"]
    heads += ["images used", "images dropped"]
    with_texts = any("texts" in statistics for statistics, _ in made.values())
    table = Table(*heads, *(["texts dropped"] if with_texts else []))
    for name, (statistics, new) in made.items():
        images = statistics.get("images", {"used": "", "dropped": {}})
        cells = (
            name if new else f"{name} (was there)",
            statistics["records_read"],
            statistics["used"],
            _counts(statistics["splits"]),
            _counts(statistics["dropped"]),
            images["used"],
            _counts(images["dropped"]),
        )
        texts = [_counts(statistics.get("texts", {"dropped": {}})["dropped"])] if with_texts else []
        table.add_row(*map(str, cells), *texts)
    return table


def _counts(counts: dict[str, int]) -> str:
    return "\n".join(f"{count} {what}" for what, count in counts.items())
