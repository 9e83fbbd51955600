"""Makes JPEGs like photos, measures how fast this machine decodes them, and feeds a training step
with them.
"""

import concurrent.futures
import io
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from flamingo_jax.planning.device_check.sections import Budget, CheckFailed, Results
from flamingo_jax.planning.device_check.sizes import DeviceCheckSize
from flamingo_jax.processing import images

QUALITY = 90
"""Of the JPEGs, as cameras and web pages save them."""
DETAIL = 24
"""Grey levels of the noise on top of the smooth colours, which gives files the size of photos."""
ROUNDS = 3


def make_photos(count: int, size: tuple[int, int]) -> list[bytes]:
    """Makes JPEGs of smooth colours and noise, each another: `size` is (width, height)."""
    rng, (width, height) = np.random.default_rng(0), size
    found = []
    for _ in range(count):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noise = rng.integers(-DETAIL, DETAIL, (height, width, 1))
        pixels = np.clip(np.asarray(smooth, np.int16) + noise, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
        found.append(buffer.getvalue())
    return found


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_images(size: DeviceCheckSize, results: Results, budget: Budget) -> None:
    """Measures decoding: images a second of one thread, and of one thread for each core.

    Raises: CheckFailed where a decoded photo is not what it was made of.
    """
    photos = make_photos(size.photos, size.photo)
    side = _image_size(size)
    results.put("cores", cores())
    results.put("photo", f"{size.photo[0]} x {size.photo[1]}, {len(photos[0]):,} bytes")
    made = images.decode(photos[0], side)
    scale = side / max(size.photo)
    expected = tuple(round(edge * scale) for edge in reversed(size.photo))
    if made.shape[:2] != expected or made.std() < 1:
        raise CheckFailed(f"a photo was decoded to {made.shape}, not to {expected}")
    one = _rate(photos, side, 1, budget)
    results.put("images_per_second_of_one_thread", one)
    every = _rate(photos, side, cores(), budget)
    results.put("images_per_second_of_all_cores", every)
    results.put("images_per_second_and_core", every / cores())


def _image_size(size: DeviceCheckSize) -> int:
    assert size.train.flamingo is not None
    return size.train.flamingo.vision.image_size


def _rate(photos: Sequence[bytes], side: int, threads: int, budget: Budget) -> float:
    """Measures the best of a few rounds of decoding all photos, in images a second."""
    best = 0.0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for _ in pool.map(lambda photo: images.decode(photo, side), photos):
                pass
            best = max(best, len(photos) / (time.perf_counter() - began))
            if budget.left < 0:
                break
    return best


class PhotoBatches:
    """A dataset's batches whose images are decoded from JPEGs as they are asked for; the rest of
    a batch stays the same. A `DataIterator`.
    """

    def __init__(
        self,
        batch: dict[str, np.ndarray],
        photos: Sequence[bytes],
        pool: concurrent.futures.Executor,
    ):
        self._batch, self._photos, self._pool, self._next = batch, photos, pool, 0

    def __next__(self) -> dict[str, np.ndarray]:
        if "images" not in self._batch:
            return self._batch
        frames = np.zeros_like(self._batch["images"])
        flat = frames.reshape(-1, *frames.shape[2:])

        def fill(place: int) -> None:
            photo = self._photos[(self._next + place) % len(self._photos)]
            made = images.decode(photo, flat.shape[1])
            flat[place, : made.shape[0], : made.shape[1]] = made

        list(self._pool.map(fill, range(len(flat))))
        self._next += len(flat)
        return self._batch | {"images": frames}

    def get_state(self) -> Any:
        """Returns the number of the next photo."""
        return self._next

    def set_state(self, state: Any) -> None:
        """Goes on from a state of `get_state`."""
        self._next = state
