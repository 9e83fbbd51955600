"""Small images and videos of made benchmarks."""

import functools
import pathlib
import tempfile

import numpy as np
from PIL import Image

from tests.processing import films


def image(path: pathlib.Path, value: int) -> None:
    """Writes an image of one grey, of 20 x 24 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 24, 3), value % 256, np.uint8)).save(path)


def video(path: pathlib.Path, value: int) -> None:
    """Writes a video of one of eight greys, of 10 seconds at 2 frames a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_film(value % 8 * 32))


@functools.cache
def _film(grey: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "made.mp4"
        films.write(path, [np.full((16, 16, 3), grey, np.uint8)] * 20, rate=2, codec="mpeg4")
        return path.read_bytes()
