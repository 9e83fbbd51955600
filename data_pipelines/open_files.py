"""Files that are read at random places stay open between reads, but only so many of them,
whatever the number of shards and datasets.
"""

import collections
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from flamingo_jax.storage import TOO_MANY_OPEN, open_files_allowed, storage_failure

T = TypeVar("T")

SHARE = 4
"""Shards, and kept features, take one in so many of the files that the process may have open
each: the rest is for checkpoints, connections and sources.
"""
MOST = 4_096
"""Open at a time, however many are allowed: each takes some 50 kB."""


class OpenFiles(Generic[T]):
    """The files used last, opened. One that is closed to make room is closed when its last
    reader lets go of it.

    Safe to use from several threads. `open_file` makes of a path what closes the file when it
    is no longer referred to.
    """

    def __init__(self, open_file: Callable[[str], T]):
        self._open, self._lock = open_file, threading.Lock()
        self._files: collections.OrderedDict[str, T] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def get(self, path: str) -> T:
        """The open file.

        Raises what `open_file` raises, of too many open files only when no other of these is
        left to close.
        """
        with self._lock:
            if path in self._files:
                self._files.move_to_end(path)
                return self._files[path]
        # Not under the lock: storage that is slow to open one file must not hold up those who
        # read others. Two threads may both open it.
        file = self._opened(path)
        with self._lock:
            self._files[path] = file
            self._shrink(min(open_files_allowed() // SHARE, MOST))
        return file

    def forget(self, path: str) -> None:
        """What is wrong with an open file, such as a stale handle, is not with one that is
        opened anew.
        """
        with self._lock:
            self._files.pop(path, None)

    def _opened(self, path: str) -> T:
        while True:
            try:
                return self._open(path)
            except Exception as error:
                failure = storage_failure(error)
                with self._lock:
                    if failure is None or failure.errno not in TOO_MANY_OPEN or not self._files:
                        raise
                    self._shrink(len(self._files) // 2)

    def _shrink(self, count: int) -> None:
        while len(self._files) > max(count, 0):
            self._files.popitem(last=False)
