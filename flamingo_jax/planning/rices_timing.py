"""Times RICES at scale: embeddings are stored on disk and searched for the nearest of queries, in
processes of their own, and the choice is compared with sorting every similarity in float64.

The embeddings are made, in the place of an encoder. Each process has a store of its own rows and
searches it; the results are merged. Processes are also what makes the peak of memory one of this
work alone.
"""

import functools
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.selection.feature_store import FeatureSet, FeatureStore
from flamingo_jax.evaluation.selection.nearest import Nearest, merge, search

BATCH = 4096
"""Embeddings that are made at a time."""
CLUSTERS = 1000
"""Directions around which embeddings lie, at a cosine of about 0.7, as images of one kind do."""
TWINS = 64
"""One in so many embeddings equals the one before it, as images that a set has twice."""
ALL_QUERIES = -1
"""Stands for the number of a batch of embeddings, for the queries."""
SECONDS = 3600
"""How long a process may take."""
_CHILD = """
import sys
from flamingo_jax.planning.rices_timing import run_part
run_part(*sys.argv[1:])
"""


class RicesWork(NamedTuple):
    """What is searched for what.

    rows: embeddings of the support set. width: numbers in each, float32. nearest: how many are
    found for each query. sample: queries whose choice is compared. processes: that share the
    rows.
    """

    rows: int
    queries: int
    width: int
    nearest: int = 32
    sample: int = 20
    processes: int = 1


class RicesTiming(NamedTuple):
    """Holds what was measured.

    bytes: of the embeddings. made: seconds in which they were made, which are not in `fill`.
    fill: seconds to write them to the disk. search: seconds to read them, compare them with all
    queries, and merge. whole: seconds by the clock for all of it, with the starts of processes.
    peak: bytes of memory of all processes at the most. compared: queries whose choice was
    compared with float64. equal: those for which it is the same, in the same order.
    """

    bytes: int
    made: float
    fill: float
    search: float
    whole: float
    peak: int
    compared: int
    equal: int

    @property
    def fill_rate(self) -> float:
        """Bytes a second that were stored."""
        return self.bytes / self.fill

    @property
    def search_rate(self) -> float:
        """Bytes a second that were searched for all queries."""
        return self.bytes / self.search


class PartTiming(NamedTuple):
    """What a process measured: its seconds, those of them in which embeddings were made, and the
    most bytes of its memory.
    """

    seconds: float
    made: float
    peak: int


def time_rices(work: RicesWork, folder: pathlib.Path) -> RicesTiming:
    """Stores and searches made embeddings in a new folder, and removes it.

    Raises: UserError where the folder exists, its disk is too small, or a process fails.
    """
    size = 4 * work.rows * work.width
    if folder.exists():
        raise UserError(f"{folder} is there already: name a folder that is made and removed")
    folder.mkdir(parents=True)
    try:
        free = shutil.disk_usage(folder).free
        if free < 1.1 * size:
            raise UserError(
                f"{folder} is on a disk with {free / 1e9:.3g} GB free, but the embeddings take"
                f" {size / 1e9:.3g} GB: name a folder on another, or take fewer rows"
            )
        began = time.monotonic()
        filled = _run("fill", work, folder)
        searched = _run("search", work, folder)
        merging = time.monotonic()
        found = merge([_read_part(folder, part) for part in _parts(work)], work.nearest)
        ended = time.monotonic()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    expected = brute_force(work)
    return RicesTiming(
        size,
        max(part.made for part in filled),
        max(part.seconds - part.made for part in filled),
        max(part.seconds for part in searched) + ended - merging,
        ended - began,
        max(sum(part.peak for part in phase) for phase in (filled, searched)),
        len(expected),
        int((found.rows[: len(expected)] == expected).all(axis=1).sum()),
    )


def made_embeddings(work: RicesWork, batch: int) -> np.ndarray:
    """Makes unit vectors, float32 [n, C]: the embeddings of a batch, or of `ALL_QUERIES`."""
    rows = work.queries if batch == ALL_QUERIES else min(BATCH, work.rows - batch * BATCH)
    rng = np.random.Generator(np.random.SFC64((1, batch + 1)))
    values = rng.standard_normal((rows, work.width), np.float32)
    values += _centres(work.width)[rng.integers(CLUSTERS, size=rows)]
    values /= np.sqrt(np.einsum("nc,nc->n", values, values))[:, None]
    if batch != ALL_QUERIES:
        twins = np.arange(TWINS - 1, rows, TWINS)
        values[twins] = values[twins - 1]
    return values


@functools.cache
def _centres(width: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((CLUSTERS, width), np.float32)


def brute_force(work: RicesWork) -> np.ndarray:
    """Sorts all similarities of the first queries, each computed in float64 and by itself, and
    returns the numbers of the nearest, int64 [`sample`, K].
    """
    queries = made_embeddings(work, ALL_QUERIES)[: work.sample].astype(np.float64)
    similarities = np.empty((len(queries), work.rows))
    for batch in range(math.ceil(work.rows / BATCH)):
        rows = made_embeddings(work, batch).astype(np.float64)
        for query, found in zip(queries, similarities, strict=True):
            # By rows: a BLAS product may round equal rows differently.
            found[batch * BATCH : batch * BATCH + len(rows)] = np.vecdot(rows, query)
    return np.array([np.argsort(-one, kind="stable")[: work.nearest] for one in similarities])


def run_part(phase: str, work: str, folder: str, part: str) -> None:
    """Fills or searches the store of one process, and prints the `PartTiming`."""
    todo = RicesWork(*json.loads(work))
    where, number = pathlib.Path(folder), int(part)
    began = time.monotonic()
    made = _fill(todo, where, number) if phase == "fill" else _search(todo, where, number)
    print(json.dumps(PartTiming(time.monotonic() - began, made, _peak())))


def _fill(work: RicesWork, folder: pathlib.Path, part: int) -> float:
    """Stores a part; returns the seconds in which its embeddings were made."""
    made, rows = 0.0, _parts(work)[part]

    def encode(first: int, stop: int) -> np.ndarray:
        nonlocal made
        began = time.monotonic()
        values = made_embeddings(work, (rows.start + first) // BATCH)
        made += time.monotonic() - began
        return values

    _store(work, folder, part).fill(encode, batch=BATCH)
    return made


def _search(work: RicesWork, folder: pathlib.Path, part: int) -> float:
    first, store = _parts(work)[part].start, _store(work, folder, part)
    queries = made_embeddings(work, ALL_QUERIES)
    found = search(queries, store.blocks(), work.nearest, first=first)
    np.savez(folder / f"nearest-{part}.npz", **found._asdict())
    return 0.0


def _read_part(folder: pathlib.Path, part: int) -> Nearest:
    with np.load(folder / f"nearest-{part}.npz", allow_pickle=False) as found:
        return Nearest(found["rows"], found["similarities"])


def _parts(work: RicesWork) -> dict[int, range]:
    """Returns {process: its rows}, whole batches; none is without rows."""
    batches = math.ceil(work.rows / BATCH)
    count = min(work.processes, batches)
    edges = [min(work.rows, batches * part // count * BATCH) for part in range(count + 1)]
    return {part: range(edges[part], edges[part + 1]) for part in range(count)}


def _store(work: RicesWork, folder: pathlib.Path, part: int) -> FeatureStore:
    features = FeatureSet("made", f"part {part}", len(_parts(work)[part]))
    return FeatureStore(folder / f"part-{part}", features)


def _run(phase: str, work: RicesWork, folder: pathlib.Path) -> list[PartTiming]:
    """Runs a phase in all processes at once, which share the cores."""
    parts = _parts(work)
    threads = str(max(1, (os.cpu_count() or 1) // len(parts)))
    environment = os.environ | (
        {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads} if len(parts) > 1 else {}
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _CHILD, phase, json.dumps(work), str(folder), str(part)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for part in parts
    ]
    try:
        told = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        raise UserError(f"the {phase} of embeddings failed: mend what its message above says")
    return [PartTiming(*json.loads(text)) for text in told]


def _peak() -> int:
    """Returns the most memory that this process had, in bytes; 0 where the system does not tell
    it of this program alone.
    """
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)
