"""Measures reading speed: on one core against a loop that only decodes the same images, with
several reader threads, and how long a training step would wait for data.
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
"""Repetitions of each loop. They alternate, so that other load on the machine affects all
alike; the median is reported.
"""


class ReadingSpeed(NamedTuple):
    """Reading speed on one core.

    bare: images per second of the loop that only decodes.
    rows: images per second of the iterator.
    fill: fraction of the rows' tokens that is not padding.
    images: number of images in a pass.
    """

    bare: float
    rows: float
    fill: float
    images: int

    @property
    def share(self) -> float:
        """Returns the iterator's speed as a fraction of the bare loop's."""
        return self.rows / self.bare


def time_reading(iterator: BatchIterator, image_size: int, batches: int) -> ReadingSpeed:
    """Times an iterator's first `batches` batches, and decoding alone of the same images.

    Each pass makes the same rows. Tokens are cached after the first, uncounted pass, as in
    training after the first epoch.

    iterator: without readers (so that it works in this thread) and without an image cache.
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
    """Measures images per second of wall time by number of reader threads.

    The first pass, which fills the cache of tokens, is not counted; then the numbers
    alternate.

    Args:
      make: makes an iterator, without an image cache, that these readers prefetch.
      counts: the numbers of threads.
      batches: batches per pass.

    Returns: {number of threads: images per second}.
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
    """Decodes an image the obvious way: at the smallest sufficient JPEG scale, then resized so
    that the longer side is `size`. It is the baseline, deliberately independent of
    `images.decode`.
    """
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (2 * size, 2 * size))
        scale = size / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


def waiting_share(iterators: Mapping[str, BatchIterator], step_seconds: float, steps: int) -> float:
    """Measures which fraction of its time a training loop would wait for data, if a step took
    `step_seconds` and a batch of each iterator. The first batches are not counted.
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
    """Measures the CPU seconds of an iteration, so that other processes do not count.

    Items are dropped at once, as in training after a step.
    """
    began = time.process_time()
    for _ in work:
        pass
    return time.process_time() - began


@contextlib.contextmanager
def _decoded() -> Iterator[list[bytes]]:
    """Records the encoded images that are decoded within the context, in order."""
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
    """Pins the process to one core, where the system allows it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
