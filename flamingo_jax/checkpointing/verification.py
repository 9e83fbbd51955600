"""Computes digests of files that all processes of a run read: each file is hashed once per
run, by one of the processes.

Processes that see the same files (equal in name, size, time and inode, as on shared storage or
on one host) divide the files among themselves and exchange the digests. Hosts with their own
copies hash these, and the digests are compared.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import heapq
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from flamingo_jax import paths
from flamingo_jax.checkpointing import manifest
from flamingo_jax.checkpointing.manifest import FileDigest
from flamingo_jax.distributed.process_group import ProcessGroup, SingleProcess
from flamingo_jax.errors import UserError

THREADS = min(4, os.cpu_count() or 1)
SETTLED_SECONDS = 2.0
"""A file that changed within this time may change again without its time stamp showing it, so
its digest is not cached.
"""
SHA = hashlib.sha256().digest_size


class FileStamp(NamedTuple):
    """Identifies the content of a file without reading it: as long as the stamp is the same,
    so is the content.
    """

    path: str
    bytes: int
    changed: float
    id: int


_known: dict[FileStamp, FileDigest] = {}
"""Digests that are known already: the start of a run asks for the same files several times."""


@dataclasses.dataclass(frozen=True)
class ProcessExchange:
    """Exchanges arrays between the processes of a run.

    gather: all-gathers an array of the same shape from every process: [...] -> [count, ...].
    """

    index: int
    count: int
    gather: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def here(cls) -> "ProcessExchange":
        """Makes the exchange between the processes of this JAX run."""
        gather = multihost_utils.process_allgather
        return cls(
            jax.process_index(), jax.process_count(), lambda array: np.asarray(gather(array))
        )


def file_digests(
    folder: pathlib.Path,
    names: Sequence[str],
    process_group: ProcessGroup | None = None,
    exchange: ProcessExchange | None = None,
) -> dict[str, FileDigest]:
    """Returns size and digest of files in a folder. Every process of the run must call it with
    the same files.

    Raises: UserError when processes find different files or contents, OSError when a file that
      is hashed here cannot be read.
    """
    process_group, exchange = process_group or SingleProcess(), exchange or ProcessExchange.here()
    stamps = {name: _stamp(folder / name) for name in names}
    told = np.concatenate([_sha(list(names)), _sha([stamp[1:] for stamp in stamps.values()])])
    known = all(stamp in _known for stamp in stamps.values())
    among = np.zeros((1, told.size), np.uint8)
    if exchange.count > 1:
        process_group.barrier(f"what is known of {folder}")
        gathered = exchange.gather(np.append(told, np.uint8(known)))
        # The last element says whether a process knows all digests already. All must, or all
        # of them take part in the exchange below.
        among, known = gathered[:, :-1], bool(gathered[:, -1].all())
        _require_equal(among[:, :SHA], folder, "other files")
    if known:
        return {name: _known[stamp] for name, stamp in stamps.items()}
    # The processes that see the same files as this one divide them among themselves.
    same = np.flatnonzero((among == among[exchange.index]).all(1)).tolist()
    shares = partition_by_size([stamp.bytes for stamp in stamps.values()], len(same))
    mine = [names[place] for place in shares[same.index(exchange.index)]]
    found = _hash(folder, mine, process_group)
    if exchange.count > 1:
        found = _share_digests(folder, names, stamps, found, process_group, exchange)
    # Remember the digests, but not of files that have just changed.
    settled = time.time() - SETTLED_SECONDS
    _known.update({m: found[n] for n, m in stamps.items() if m.changed < settled})
    return found


def verify(
    folder: pathlib.Path, listing: manifest.Manifest, process_group: ProcessGroup | None = None
) -> None:
    """Compares the files of a folder with its manifest; every byte is read once per run.

    Raises: DamageError for the first file whose size or content differs, otherwise like
      `file_digests`.
    """
    manifest.check_sizes(folder, listing)
    found = file_digests(folder, list(listing.files), process_group)
    for name, entry in listing.files.items():
        if found[name] != entry:
            raise manifest.DamageError(folder, name, "has other content than its manifest says")


def partition_by_size(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Divides files among `count` processes so that each gets about the same number of bytes.

    Returns: for each process, the indices into `sizes` of its files.
    """
    # Largest first, each to the process with the fewest bytes so far.
    loads = [(0, member) for member in range(count)]
    dealt: list[list[int]] = [[] for _ in range(count)]
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        load, member = heapq.heappop(loads)
        dealt[member].append(place)
        heapq.heappush(loads, (load + sizes[place], member))
    return dealt


def _stamp(file: pathlib.Path) -> FileStamp:
    found = manifest.retry_read(lambda: paths.version(file))
    return FileStamp(str(file.absolute()), found.bytes, found.changed, found.id)


def _sha(value: object) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(json.dumps(value).encode()).digest(), np.uint8)


def _hash(
    folder: pathlib.Path, names: Sequence[str], process_group: ProcessGroup
) -> dict[str, FileDigest]:
    what = f"verifying {folder.name}"
    process_group.report_progress(what)
    try:
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            progress = functools.partial(process_group.report_progress, what)
            found = pool.map(lambda name: manifest.file_digest(folder / name, progress), names)
            return dict(zip(names, found, strict=True))
    finally:
        process_group.report_progress("")


def _share_digests(
    folder: pathlib.Path,
    names: Sequence[str],
    stamps: dict[str, FileStamp],
    found: dict[str, FileDigest],
    process_group: ProcessGroup,
    exchange: ProcessExchange,
) -> dict[str, FileDigest]:
    """Exchanges digests with the other processes. found: {name: digest} that this one
    hashed.
    """
    own = np.zeros((len(names), SHA), np.uint8)
    for place, name in enumerate(names):
        if name in found:
            own[place] = np.frombuffer(bytes.fromhex(found[name].sha256), np.uint8)
    process_group.barrier(f"the digests of {folder}")
    gathered = exchange.gather(own)
    complete: dict[str, FileDigest] = {}
    for place, name in enumerate(names):
        hashed = gathered[:, place]
        # Zeros are from processes that did not hash this file.
        hashed = hashed[hashed.any(1)]
        _require_equal(hashed, folder / name, "another content")
        complete[name] = FileDigest(stamps[name].bytes, hashed[0].tobytes().hex())
    return complete


def _require_equal(told: np.ndarray, where: pathlib.Path, what: str) -> None:
    if len(np.unique(told, axis=0)) > 1:
        raise UserError(f"{where} has {what} on some hosts than on others: put the same on all")
