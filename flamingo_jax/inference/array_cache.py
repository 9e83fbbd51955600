"""A least-recently-used cache of arrays on the host, bounded in bytes."""

import collections
import threading
from collections.abc import Callable, Sequence

import numpy as np


class ArrayCache:
    """Caches arrays by digest. When they exceed `most_bytes`, the least recently used are
    dropped. Threads take turns, so that none makes what another is making.
    """

    def __init__(self, most_bytes: int):
        self._most_bytes, self._bytes = most_bytes, 0
        self._arrays: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(
        self, digests: Sequence[bytes], make: Callable[[list[bytes]], dict[bytes, np.ndarray]]
    ) -> dict[bytes, np.ndarray]:
        """Returns {digest: array}; `make` computes all missing ones in one call, if there are
        any.
        """
        with self._lock:
            missing = [digest for digest in digests if digest not in self._arrays]
            made = make(missing) if missing else {}
            found = {digest: made.get(digest, self._arrays.get(digest)) for digest in digests}
            self._arrays.update(made)
            self._bytes += sum(array.nbytes for array in made.values())
            # The dict's order is that of the last use.
            for digest in digests:
                self._arrays.move_to_end(digest)
            while self._bytes > self._most_bytes:
                self._bytes -= self._arrays.popitem(last=False)[1].nbytes
            return found  # type: ignore[return-value]
