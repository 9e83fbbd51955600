"""Compares runs of a suite cell by cell: items matched by id, differences with their error, and
what besides the model differs.
"""

import math
import pathlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flamingo_jax.evaluation.metrics.average_precision import roc_auc
from flamingo_jax.evaluation.results.result_file import CellResult, read_results
from flamingo_jax.evaluation.results.stored_predictions import item_score, read_predictions, rescore
from flamingo_jax.evaluation.results.what_was_run import flatten
from flamingo_jax.evaluation.statistics import (
    RunDifference,
    Statistic,
    paired_bootstrap,
    paired_difference,
)

TOLERANCE = 1e-9
"""How near a statistic of the items must be to the score of the file to be taken for it."""


class CellKey(NamedTuple):
    """What cells of two runs are matched by.

    selection: of all runs, where each has another one: "random and rices".
    """

    benchmark: str
    selection: str
    shots: int
    seed: int
    control: bool

    @classmethod
    def of(cls, cell: CellResult) -> "CellKey":
        """Returns a cell's key."""
        return cls(cell.benchmark, cell.selection, cell.shots, cell.seed, cell.control)


class SuiteRun(NamedTuple):
    """An output folder of `launch.evaluate --suite`.

    name: in the tables.
    """

    name: str
    folder: pathlib.Path
    cells: Mapping[CellKey, CellResult]


class CellComparison(NamedTuple):
    """A cell of one run compared with that of another.

    difference: second less first, from 0 to 1; None where it has no test.
    items: how many are in both.
    why: why there is no test, or what else a reader must know; "" for nothing.
    """

    difference: RunDifference | None
    items: int
    why: str


class _Scored(NamedTuple):
    """The items of a cell: their scores by id, and what their statistics need."""

    items: dict[str, Mapping[str, Any]]
    clusters: dict[str, str]
    types: dict[str, str]


def read_runs(folders: Sequence[pathlib.Path]) -> list[SuiteRun]:
    """Reads the results of runs; they are named by their folders. Raises UserError."""
    names = [folder.resolve().name for folder in folders]
    unique = len(set(names)) == len(names)
    read = [read_results(folder) for folder in folders]
    selections = _differing_selections(read)

    def key(cell: CellResult) -> CellKey:
        return CellKey.of(cell)._replace(
            selection=selections.get(cell.benchmark, cell.selection) if cell.shots else ""
        )

    return [
        SuiteRun(name if unique else str(folder), folder, {key(cell): cell for cell in cells})
        for name, folder, cells in zip(names, folders, read, strict=True)
    ]


def _differing_selections(runs: Sequence[Sequence[CellResult]]) -> dict[str, str]:
    """Returns {benchmark: names of the selections} where each run has one and they differ: a run
    with random shots is compared with one of RICES.
    """
    found: dict[str, list[set[str]]] = defaultdict(list)
    for cells in runs:
        own: dict[str, set[str]] = defaultdict(set)
        for cell in cells:
            if cell.shots:
                own[cell.benchmark].add(cell.selection)
        for benchmark, selections in own.items():
            found[benchmark].append(selections)
    return {
        benchmark: " and ".join(sorted(set().union(*selections)))
        for benchmark, selections in found.items()
        if all(len(one) == 1 for one in selections) and len(set().union(*selections)) > 1
    }


def compare_cells(
    first: SuiteRun, second: SuiteRun, key: CellKey, wordnet: str = ""
) -> CellComparison:
    """Compares a cell that both runs have, by the predictions that they stored.

    wordnet: see `stored_predictions.rescore`.

    Raises: UserError where these are missing or malformed, and without WordNet.
    """
    one, other = first.cells[key], second.cells[key]
    if one.headline != other.headline:
        return CellComparison(None, 0, f"{one.headline} and {other.headline} are not comparable")
    if not one.headline:
        return CellComparison(None, 0, "there are no ground truths")
    scored = _scored(first.folder, one, wordnet), _scored(second.folder, other, wordnet)
    ids = [name for name in scored[0].items if name in scored[1].items]
    if len(ids) < 2:
        return CellComparison(None, len(ids), "the runs have too few items in common")
    surplus = sum(len(part.items) - len(ids) for part in scored)
    why = f"{surplus:,} items of one run alone are left out" if surplus else ""
    clusters = [scored[0].clusters.get(name) or name for name in ids]
    if all(_is_mean(part, cell) for part, cell in zip(scored, (one, other), strict=True)):
        before, after = (
            [item_score(part.items[name], one.headline) or 0.0 for name in ids] for part in scored
        )
        return CellComparison(paired_difference(before, after, clusters), len(ids), why)
    statistics = [
        _statistic(part, cell, ids) for part, cell in zip(scored, (one, other), strict=True)
    ]
    if statistics[0] is None or statistics[1] is None:
        return CellComparison(None, len(ids), f"{one.headline} has no paired test")
    found = paired_bootstrap(statistics[0], statistics[1], len(ids), clusters)
    return CellComparison(found, len(ids), why)


def _scored(folder: pathlib.Path, cell: CellResult, wordnet: str) -> _Scored:
    file = folder / cell.predictions
    stored = read_predictions(file)
    return _Scored(
        {str(item["id"]): item for item in rescore(stored, file, wordnet).items},
        {one.id: one.cluster for one in stored.predictions},
        {one.id: one.question_type for one in stored.predictions},
    )


def _is_mean(scored: _Scored, cell: CellResult) -> bool:
    """Returns whether a cell's score is the mean of its items' scores."""
    values = [item_score(item, cell.headline) for item in scored.items.values()]
    known = [value for value in values if value is not None]
    same_number = len(known) == len(values)
    return same_number and abs(float(np.mean(known)) - cell.estimate.score) < TOLERANCE


def _statistic(scored: _Scored, cell: CellResult, ids: Sequence[str]) -> Statistic | None:
    """Returns a score that is no mean as a function of how often each item of `ids` is drawn;
    None where none of those known here reproduces the cell's score.
    """
    for make in (_area_under_curve, _mean_of_types):
        try:
            whole = make(scored, list(scored.items))(np.ones(len(scored.items), np.int64))
        except (KeyError, TypeError, ValueError, IndexError):
            continue
        if abs(whole - cell.estimate.score) < TOLERANCE:
            return make(scored, ids)
    return None


def _area_under_curve(scored: _Scored, ids: Sequence[str]) -> Statistic:
    labels = np.array([scored.items[name]["label"] for name in ids]) == 1
    scores = np.array([float(scored.items[name]["score"]) for name in ids])
    return lambda counts: roc_auc(labels, scores, counts.astype(np.float64))


def _mean_of_types(scored: _Scored, ids: Sequence[str]) -> Statistic:
    """Returns the mean over types of questions of their accuracies (STAR)."""
    scores = np.array([float(scored.items[name]["accuracy"]) for name in ids])
    types, numbers = np.unique([scored.types[name] for name in ids], return_inverse=True)

    def statistic(counts: np.ndarray) -> float:
        drawn = np.bincount(numbers, counts, len(types))
        if not drawn.all():
            return math.nan
        return float(np.mean(np.bincount(numbers, counts * scores, len(types)) / drawn))

    return statistic


def warnings(first: SuiteRun, second: SuiteRun) -> list[str]:
    """Says, a sentence each, what besides the model differs between the runs' common cells."""
    found: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for key in first.cells:
        if key in second.cells:
            one, other = first.cells[key], second.cells[key]
            same = one.model.get("digest") == other.model.get("digest")
            for difference in differences(one, other):
                known = found[difference, same]
                known += [] if key.benchmark in known else [key.benchmark]
    return [
        f"{', '.join(benchmarks)}: {first.name} and {second.name} differ in {difference}, "
        + (
            "and their model is the same."
            if same
            else "so that the difference of their scores is not the model's alone."
        )
        for (difference, same), benchmarks in found.items()
    ]


def differences(one: CellResult, other: CellResult) -> list[str]:
    """Names what two runs of a cell differ in: choices, annotation files, number of queries."""
    found = []
    mine, yours = flatten(one.protocol), flatten(other.protocol)
    for name in {**mine, **yours}:
        if mine.get(name) != yours.get(name):
            found.append(f"{name} ({mine.get(name, 'unset')} and {yours.get(name, 'unset')})")
    if one.protocol_hash != other.protocol_hash and not found:
        found.append(f"their protocol ({one.protocol_hash[:12]} and {other.protocol_hash[:12]})")
    for name in {**one.references, **other.references}:
        digests = [cell.references.get(name, "none")[:12] for cell in (one, other)]
        if one.references.get(name) != other.references.get(name):
            found.append(f"the annotation file {name} ({' and '.join(digests)})")
    if one.n != other.n:
        found.append(f"the number of queries ({one.n:,} and {other.n:,})")
    return found
