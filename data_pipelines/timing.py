"""How fast a dataset is read on one core, against a loop that does nothing but decode the same
images; what more readers gain; how long a step waits.
"""

import contextlib
import io
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_pipelines.batches import BatchIterator
from data_pipelines.readers import Readers
from flamingo_jax.processing import images

PASSES = 5
"""Of each loop, in turn, so that a slow moment of the machine meets both; the medians are
taken.
"""


class ReadingSpeed(NamedTuple):
    """Images a second of the bare loop and of the rows. fill: part of the rows' tokens that
    is no padding. images: met in one pass.
    """

    bare: float
    rows: float
    fill: float
    images: int

    @property
    def share(self) -> float:
        """Of the bare loop's speed."""
        return self.rows / self.bare


def time_reading(iterator: BatchIterator, image_size: int, batches: int) -> ReadingSpeed:
    """Makes the first `batches` batches of an iterator that reads nothing ahead and keeps no
    image, and decodes their images alone.

    Every pass makes the same rows. What an iterator keeps of texts is there from the second on,
    as it is in training from the second epoch.
    """

    def rows() -> Iterator[dict[str, Any]]:
        iterator.set_state({"global_next_index": 0})
        return itertools.islice(iterator, batches)

    with _one_core():
        with _decoded() as encoded:
            full = [
                float((batch["segments"] > 0).mean()) for batch in rows() if "segments" in batch
            ]
        seconds: dict[str, list[float]] = {"bare": [], "rows": []}
        for _ in range(PASSES):
            seconds["bare"].append(_seconds(bare(data, image_size) for data in encoded))
            seconds["rows"].append(_seconds(rows()))
    rate = {name: len(encoded) / statistics.median(taken) for name, taken in seconds.items()}
    return ReadingSpeed(
        rate["bare"], rate["rows"], statistics.fmean(full) if full else 0.0, len(encoded)
    )


def time_readers(
    make: Callable[[Readers], BatchIterator], counts: Sequence[int], batches: int
) -> dict[int, float]:
    """Measures images a second by the clock, by how many readers make them: the first
    `batches` batches of each `make(readers)`, which keeps no image.

    The first pass is not counted: it fills what is kept of texts. Then all numbers take turns.
    """
    iterators = {count: make(Readers(count)) for count in counts}
    rates: dict[int, list[float]] = {count: [] for count in counts}
    for turn in range(PASSES + 1):
        for count, it in iterators.items():
            it.set_state({"global_next_index": 0})
            began, count_read = time.perf_counter(), 0
            for batch in itertools.islice(it, batches):
                count_read += (
                    int(batch["frame_mask"].sum())
                    if "frame_mask" in batch
                    else len(batch["images"])
                )
            if turn:
                rates[count].append(count_read / (time.perf_counter() - began))
            it.close()
    return {count: statistics.median(found) for count, found in rates.items()}


def bare(data: bytes, size: int) -> np.ndarray:
    """Reads an image as anyone would: decoded, as small as the JPEG allows, and resized so
    that the longer side is `size`.
    """
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (2 * size, 2 * size))
        scale = size / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


def waiting_share(iterators: Mapping[str, BatchIterator], step_seconds: float, steps: int) -> float:
    """Measures the part of the time that a loop waits which takes a batch of each iterator and
    `step_seconds` for a step; the first batches are not counted.
    """
    for it in iterators.values():
        next(it)
    waited = 0.0
    began = time.perf_counter()
    for _ in range(steps):
        time.sleep(step_seconds)
        asked = time.perf_counter()
        for it in iterators.values():
            next(it)
        waited += time.perf_counter() - asked
    return waited / (time.perf_counter() - began)


def _seconds(work: Iterable[Any]) -> float:
    """Of the processor, so that what else runs on the machine does not count.

    What is made is let go at once, as training does after a step.
    """
    began = time.process_time()
    for _ in work:
        pass
    return time.process_time() - began


@contextlib.contextmanager
def _decoded() -> Iterator[list[bytes]]:
    """The files that are decoded meanwhile, in order."""
    met: list[bytes] = []
    decode = images.decode

    def noting(data: bytes, size: int, **options: Any) -> np.ndarray:
        met.append(data)
        return decode(data, size, **options)

    images.decode = noting
    try:
        yield met
    finally:
        images.decode = decode


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Where the system can pin a process."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
