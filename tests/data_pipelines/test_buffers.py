"""Memory that batches share one after the other holds nothing of those before, and is nobody
else's meanwhile.
"""

import gc
import random
import threading
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from data_pipelines.transforms.buffers import ALIGNMENT, BufferPool

SHAPE = (3, 2, 4, 5)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, ml_dtypes.bfloat16])
def test_memory_is_zero_again_and_used_again(dtype: type) -> None:
    """Wherever the batch itself wrote nothing that is kept, whatever stood there before."""
    blanks, places, random_ = BufferPool(), set(), np.random.default_rng(0)
    for _ in range(10):
        blank = blanks.take(SHAPE, np.dtype(dtype), leading=2)
        array = blank.array
        assert (
            array.shape == SHAPE
            and array.dtype == dtype
            and array.flags.writeable
            and array.flags.c_contiguous
        )
        assert array.ctypes.data % ALIGNMENT == 0
        places.add(array.ctypes.data)
        written, kept = random_.random(SHAPE[:2]) < 0.5, random_.random(SHAPE[:2]) < 0.7
        array[written] = 7
        assert blanks.finish(blank, written, kept & written) is array
        np.testing.assert_array_equal(
            array.astype(int).sum((2, 3)), np.where(kept & written, 7 * 20, 0)
        )
        del array, blank
    assert len(places) == 1


VIEWS = {
    "slice": lambda array: array[1],
    "reshaped": lambda array: array.reshape(6, 4, 5)[::2],
    "buffer": memoryview,
    "on a device": jax.device_put,
    "a part on a device": lambda array: jax.device_put(array.reshape(6, 4, 5)[2:4]),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_memory_that_anyone_holds_is_left_alone(view: Callable[[np.ndarray], Any]) -> None:
    blanks = BufferPool()
    every = np.ones(SHAPE[:1], bool)
    blank = blanks.take(SHAPE, np.dtype(np.uint8), leading=1)
    blank.array[:] = 7
    held = view(blanks.finish(blank, every, every))
    del blank
    for _ in range(3):
        other = blanks.take(SHAPE, np.dtype(np.uint8), leading=1)
        other.array[:] = 9
        blanks.finish(other, every, every)
        assert (np.asarray(held) == 7).all()


def test_threads_never_share_memory() -> None:
    blanks, wrong = BufferPool(), []

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(300):
            blank = blanks.take(SHAPE, np.dtype(np.uint8), leading=1)
            first = np.array([True, False, False])
            blank.array[0] = number
            array = blanks.finish(blank, first, first)
            del blank
            wrong.append(array[1:].any())
            # In a cycle, so that the garbage collector gives it back whenever it comes.
            cycle: list[object] = [array[0]]
            cycle.append(cycle)
            if chance.random() < 0.1:
                gc.collect()
            wrong.append((array[0] != number).any())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    gc.freeze()  # What other tests left is not gone through at each collection.
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.unfreeze()
    assert not any(wrong) and len(wrong) == 4 * 300 * 2
