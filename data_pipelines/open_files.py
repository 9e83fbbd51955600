"""A least-recently-used cache of open files, so that datasets of any number of shards stay
within the process's limit of open files.
"""

import collections
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from flamingo_jax.storage import TOO_MANY_OPEN, open_files_allowed, storage_failure

T = TypeVar("T")

SHARE = 4
"""Each cache (there are two, of shards and of cached features) uses at most 1 / SHARE of the
files that the process may open; the rest is for checkpoints, connections and sources.
"""
MOST = 4_096
"""The most open files of a cache, whatever the limit: each takes about 50 kB of memory."""


class OpenFiles(Generic[T]):
    """The open files that were used most recently. Thread-safe.

    A file is not closed while another thread uses it: dropping it from the cache only drops a
    reference.

    open_file: opens a path; the object it returns closes the file when garbage collected.
    """

    def __init__(self, open_file: Callable[[str], T]):
        self._open, self._lock = open_file, threading.Lock()
        self._files: collections.OrderedDict[str, T] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def get(self, path: str) -> T:
        """Returns the open file of a path, opening it if needed.

        Raises: what `open_file` raises; for too many open files only after all others of this
          cache have been closed.
        """
        with self._lock:
            if path in self._files:
                self._files.move_to_end(path)
                return self._files[path]
        # Without the lock: a slow open must not block threads that read other files. Two
        # threads may both open the file; one of the two is then closed.
        file = self._opened(path)
        with self._lock:
            self._files[path] = file
            self._shrink(min(open_files_allowed() // SHARE, MOST))
        return file

    def forget(self, path: str) -> None:
        """Drops a file, so that the next `get` opens it again, e.g. after a stale handle."""
        with self._lock:
            self._files.pop(path, None)

    def _opened(self, path: str) -> T:
        """Opens a file; on too many open files closes half of the cache and tries again."""
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
