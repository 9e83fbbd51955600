"""Says what a suite's scores are of: the choices of the protocol, and what identifies the model,
the code and the annotation files.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flamingo_jax.evaluation.results.result_file import PAPER_SCALE, CellResult, estimate_of
from flamingo_jax.evaluation.results.score_table import ScoreRow

DIGEST = 12
"""Characters of a digest that are shown."""
OF_CELL = ("benchmark", "shots", "seed", "selection", "shot_images")
"""Choices that tell the cells of a table apart, and are in its header and rows."""


class RunSection(NamedTuple):
    """A table with its heading."""

    heading: str
    header: list[str]
    rows: list[list[str]]


def flatten(protocol: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns {dotted name: JSON of the value} of nested choices."""
    found: dict[str, str] = {}
    for name, value in protocol.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = json.dumps(value, ensure_ascii=False)
    return found


def what_was_run(rows: Sequence[ScoreRow]) -> list[RunSection]:
    """Returns the tables of a report on what was run, without those that would be empty."""
    cells = list({cell.name: cell for row in rows for cell in row.cells}.values())
    tables = (_identities, _choices, _references, _runs, _types)
    return [section for table in tables if (section := table(cells)).rows]


def _identities(cells: Sequence[CellResult]) -> RunSection:
    values: dict[str, list[str]] = {}
    for cell in cells:
        named = {
            **{f"model {name}": value for name, value in cell.model.items()},
            **{f"code {name}": value for name, value in cell.code.items()},
            "device": cell.device,
            "batch size": cell.batch_size,
        }
        for name, value in named.items():
            known = values.setdefault(name, [])
            known += [] if str(value) in known or value is None else [str(value)]
    lines = [[name, ", ".join(some)] for name, some in values.items() if some]
    return RunSection("Model, code and machine", ["", ""], lines)


def _choices(cells: Sequence[CellResult]) -> RunSection:
    """Lists every choice once where it is the same for all, else by benchmark."""
    values: dict[str, dict[str, list[str]]] = {}
    for cell in cells:
        for name, value in flatten(cell.protocol).items():
            if name not in OF_CELL:
                known = values.setdefault(name, {}).setdefault(value, [])
                known += [] if cell.benchmark in known else [cell.benchmark]
    benchmarks = {cell.benchmark for cell in cells}
    lines = []
    for name, by_value in values.items():
        for value, of in by_value.items():
            everywhere = len(by_value) == 1 and len(of) == len(benchmarks)
            lines.append([name, value, "all" if everywhere else ", ".join(of)])
    return RunSection("Protocol", ["choice", "value", "benchmarks"], lines)


def _references(cells: Sequence[CellResult]) -> RunSection:
    found = {
        (cell.benchmark, name, digest) for cell in cells for name, digest in cell.references.items()
    }
    lines = [list(one) for one in sorted(found)]
    return RunSection("Annotation files", ["benchmark", "file", "SHA-256"], lines)


def _runs(cells: Sequence[CellResult]) -> RunSection:
    lines = [
        [
            cell.name,
            f"{cell.n:,}",
            f"{cell.missing:,} ({cell.missing_media.get('policy', '')})",
            cell.protocol_hash[:DIGEST],
            f"{cell.seconds:,.1f}",
            f"{cell.seconds_waiting_for_media:,.1f}",
        ]
        for cell in cells
    ]
    header = ["run", "queries", "missing", "protocol", "seconds", "waiting for images"]
    return RunSection("Runs", header, lines)


def _types(cells: Sequence[CellResult]) -> RunSection:
    """Lists the other metrics and the scores by type of question of each run."""
    lines = []
    for cell in cells:
        others = {
            name: estimate_of(metric).score
            for name, metric in cell.metrics.items()
            if name != cell.headline
        }
        for key, types in cell.about.items():
            if key.startswith("by_") and isinstance(types, Mapping):
                others |= {f"of {name}": float(score) for name, score in types.items()}
        if others:
            told = ", ".join(f"{name} {PAPER_SCALE * one:.1f}" for name, one in others.items())
            lines.append([cell.name, told])
    return RunSection("Other metrics, and types of questions", ["run", "scores"], lines)
