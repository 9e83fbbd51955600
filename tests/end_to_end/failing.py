"""Runs launch.train on storage that fails: `python -m tests.end_to_end.failing
KIND:READ:TIMES,... --config=... --workdir=...`.

From its READth read on, a KIND of file cannot be read so many TIMES in a row: shard (records of
a dataset), lengths (what is kept of them), feature (those that are kept), info (a dataset's
description), manifest (a checkpoint's). What happened is told at the end on stderr.
"""

import atexit
import builtins
import collections
import errno
import io
import os
import re
import runpy
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from flamingo_jax import storage
from flamingo_jax.checkpointing import manifest


class Faults:
    """Which reads fail: {kind: [(first read, how many)]}.

    Errors by turns: an I/O error, a stale handle, too many open files, a timeout.
    """

    def __init__(self, told: str):
        self._failing: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
        for kind, read, times in (fault.split(":") for fault in told.split(",") if fault):
            self._failing[kind].append((int(read), int(times)))
        self._reads: collections.Counter[str] = collections.Counter()
        self._met: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def errno(self, kind: str) -> int | None:
        """Of this read, None where it goes well."""
        with self._lock:
            self._reads[kind] += 1
            for number, (first, times) in enumerate(self._failing[kind]):
                if first <= self._reads[kind] < first + times:
                    self._met.add((kind, first))
                    return (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT)[number % 4]
        return None

    def tell(self) -> None:
        print(
            f"faults met: {len(self._met)} of {sum(map(len, self._failing.values()))}; reads:"
            f" {dict(self._reads)}",
            file=sys.stderr,
        )

    def wrap(
        self, kind: str, real: Callable[..., Any], wanted: Callable[..., bool]
    ) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if wanted(*args, **options) and (number := self.errno(kind)) is not None:
                raise OSError(number, os.strerror(number), str(args[0]))
            return real(*args, **options)

        return call


def install(faults: Faults) -> None:
    real = array_record_module.ArrayRecordReader

    class Reader:
        def __init__(self, path: str, **options: Any):
            self._path, self._real = path, real(path, **options)

        def ok(self) -> bool:
            return self._real.ok()

        def read(self, places: list[int]) -> list[bytes]:
            if (number := faults.errno("shard")) is not None:
                raise RuntimeError(
                    f"pread() failed: {os.strerror(number)}; reading {self._path}; at byte 30454"
                )
            return self._real.read(places)

    array_record_module.ArrayRecordReader = Reader
    np.load = faults.wrap(
        "lengths", np.load, lambda path, *args, **options: str(path).endswith(".npz")
    )
    os.preadv = faults.wrap("feature", os.preadv, lambda *args: True)
    tfds.builder_from_directory = faults.wrap(
        "info", tfds.builder_from_directory, lambda *args, **options: True
    )

    def ours(path, mode="r", *args, **options):
        return bool(re.search(r"checkpoints/.*manifest\.json$", str(path))) and not set(mode) & set(
            "wax+"
        )

    io.open = builtins.open = faults.wrap("manifest", open, ours)  # type: ignore[assignment]
    storage.WAITS = (0.01, 0.01, 0.02, 0.05)
    manifest.READ_AGAIN_AFTER = (0.01, 0.02, 0.05)


if __name__ == "__main__":
    faults = Faults(sys.argv.pop(1))
    install(faults)
    atexit.register(faults.tell)
    runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
