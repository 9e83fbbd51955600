"""Memory for a batch's images, which earlier batches have given back, zero wherever nothing is
written.
"""

import collections
import math
import weakref
from typing import NamedTuple

import numpy as np

ALIGNMENT = 64
"""Of the memory in bytes, so that it can be a jax.Array on CPU without a copy."""
SPARE = 4
"""Batches' memories of one shape that are kept when nobody holds them."""


_Key = tuple[tuple[int, ...], np.dtype]


class _Memory(NamedTuple):
    """owner: what no array is a view of, so that numpy cannot take it for the base of one.
    written: bool, by the leading axes.
    """

    owner: memoryview
    written: np.ndarray


class Buffer(NamedTuple):
    """An array to write to. written: bool by its leading axes, True where an earlier batch's
    values still stand.
    """

    array: np.ndarray
    written: np.ndarray


class BufferPool:
    """Lends arrays to batches. Most of a batch's places may be blank, and to zero them all for
    each batch takes as long as to decode part of the others: memory that nobody holds any more
    is given out again, and only what was written and is not written over is zeroed. Safe to
    use from several threads.
    """

    def __init__(self) -> None:
        # A deque needs no lock, which would be held already where the garbage collector gives a
        # memory back in the middle of `take`.
        self._spare: dict[_Key, collections.deque[_Memory]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype, leading: int) -> Buffer:
        """To be given to `finish` when it is filled; otherwise its memory is not used again.
        leading: axes by which it is written.
        """
        try:
            memory = self._spare[shape, dtype].pop()
        except (KeyError, IndexError):
            size = math.prod(shape) * dtype.itemsize
            whole = np.zeros(size + ALIGNMENT, np.uint8)
            first = -whole.ctypes.data % ALIGNMENT
            return Buffer(
                self._array(whole.data[first : first + size], shape, dtype),
                np.zeros(shape[:leading], bool),
            )
        return Buffer(self._array(memory.owner, shape, dtype), memory.written)

    def finish(self, blank: Buffer, written: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """The array, zero but where it was written and what was written is `kept`, both bool by
        its leading axes. The memory comes back when the array and all views of it are gone.
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
        # Views of views have the first of them as their base: it lives for as long as any.
        return np.frombuffer(owner, np.uint8).view(dtype).reshape(shape)
