"""Memory that batches share one after the other holds nothing of those before, and is nobody else's meanwhile."""

import gc
import random
import threading
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from data_pipelines.transforms.blanks import ALIGNMENT, Blanks

SHAPE = (3, 2, 4, 5)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, ml_dtypes.bfloat16])
def test_memory_is_zero_again_and_used_again(dtype: type) -> None:
    blanks, places, random_ = Blanks(), set(), np.random.default_rng(0)
    for _ in range(10):
        array = blanks.take(SHAPE, np.dtype(dtype))
        assert array.shape == SHAPE and array.dtype == dtype and array.flags.writeable and array.flags.c_contiguous
        assert not array.any() and array.ctypes.data % ALIGNMENT == 0
        places.add(array.ctypes.data)
        written = random_.random(SHAPE[:2]) < 0.5
        array[written] = 7
        blanks.wrote(array, written)
        del array
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
    blanks = Blanks()
    array = blanks.take(SHAPE, np.dtype(np.uint8))
    array[:] = 7
    blanks.wrote(array, np.ones(SHAPE[:1], bool))
    held = view(array)
    del array
    for _ in range(3):
        other = blanks.take(SHAPE, np.dtype(np.uint8))
        other[:] = 9
        blanks.wrote(other, np.ones(SHAPE[:1], bool))
        assert (np.asarray(held) == 7).all()


def test_threads_never_share_memory() -> None:
    blanks, wrong = Blanks(), []

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(300):
            array = blanks.take(SHAPE, np.dtype(np.uint8))
            wrong.append(array.any())
            array[0] = number
            blanks.wrote(array, np.array([True, False, False]))
            # In a cycle, so that the garbage collector gives it back whenever it comes.
            cycle: list[object] = [array[0]]
            cycle.append(cycle)
            if chance.random() < 0.1:
                gc.collect()
            wrong.append((array[0] != number).any())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(wrong) and len(wrong) == 4 * 300 * 2
