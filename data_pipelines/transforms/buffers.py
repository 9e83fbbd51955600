"""Reuses the memory of earlier batches for the images of new ones.

Padding must be zero, and allocating and zeroing a whole batch each time would take as long as
decoding part of it.
"""

import collections
import math
import weakref
from typing import NamedTuple

import numpy as np

ALIGNMENT = 64
"""Bytes. JAX on CPU takes a numpy array of this alignment without a copy."""
SPARE = 4
"""Unused memory blocks to keep for each shape and dtype."""


_Key = tuple[tuple[int, ...], np.dtype]


class _Memory(NamedTuple):
    """A block that is free for reuse.

    owner: the raw memory. A memoryview, not an array: numpy would make an array the `base` of
      every view, and the finalizer in `finish` could no longer tell when all views are gone.
    written: bool over the array's leading axes, True where it holds nonzero values.
    """

    owner: memoryview
    written: np.ndarray


class Buffer(NamedTuple):
    """An array to fill.

    written: bool over the array's leading axes, True where it still holds values of an earlier
      batch.
    """

    array: np.ndarray
    written: np.ndarray


class BufferPool:
    """Lends arrays to batches and takes their memory back once nothing refers to them.

    Much of a batch may be padding. Only entries that an earlier batch wrote and this one does
    not overwrite are zeroed. Thread-safe.
    """

    def __init__(self) -> None:
        # deque.append and pop are atomic. A lock could deadlock: the garbage collector may run
        # a finalizer, which appends here, in the same thread in the middle of `take`.
        self._spare: dict[_Key, collections.deque[_Memory]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype, leading: int) -> Buffer:
        """Returns an array to fill and pass to `finish`; without `finish` its memory is not
        reused.

        leading: the number of leading axes that index what is written as a unit, e.g. 2 for
          frames of [M, T, H, W, 3].
        """
        try:
            memory = self._spare[shape, dtype].pop()
        except (KeyError, IndexError):
            size = math.prod(shape) * dtype.itemsize
            # Allocate too much and start at the first aligned byte.
            whole = np.zeros(size + ALIGNMENT, np.uint8)
            first = -whole.ctypes.data % ALIGNMENT
            return Buffer(
                self._array(whole.data[first : first + size], shape, dtype),
                np.zeros(shape[:leading], bool),
            )
        return Buffer(self._array(memory.owner, shape, dtype), memory.written)

    def finish(self, blank: Buffer, written: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Returns the filled array, with zeros wherever `written & kept` is False.

        The memory returns to the pool when the array and all its views have been freed.

        Args:
          written: bool over the leading axes, what this batch wrote.
          kept: bool over the leading axes, which of that is valid.
        """
        array, before = blank
        root = array.base
        assert isinstance(root, np.ndarray) and isinstance(root.base, memoryview), (
            "it is no array of these"
        )
        array[(before | written) & ~kept] = 0
        memory = _Memory(root.base, kept.copy())
        spare = self._spare.setdefault((array.shape, array.dtype), collections.deque(maxlen=SPARE))
        weakref.finalize(root, spare.append, memory).atexit = False
        return array

    @staticmethod
    def _array(owner: memoryview, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        # numpy sets the base of a view of a view to the outermost array, here that of
        # `frombuffer`: it lives as long as any view, so `finish` can watch it.
        return np.frombuffer(owner, np.uint8).view(dtype).reshape(shape)
