"""Encoded pictures to uint8 RGB squares, the same for training and inference (paper 3.2: aspect kept, padded with the mean)."""

import functools
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded: a few bytes can claim terabytes."""

ORIENTATION = 0x0112
"""The EXIF entry that says how a camera was held."""


class ImageError(ValueError):
    """A picture that cannot be read."""


def decode(data: bytes, size: int, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An encoded picture, upright and resized so that its longer side is `size`: uint8 [h, w, 3], max(h, w) = size.

    Transparent parts turn white. Raises ImageError where the bytes are no picture, are cut short, or hold more than `max_pixels`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(f"{image.width} x {image.height} pixels are more than {max_pixels}")
            # JPEGs are decoded at a half, a quarter or an eighth where that still leaves twice the size wanted.
            image.draft("RGB", (2 * size, 2 * size))
            # Both copy the picture even where there is nothing to do.
            turned = image.getexif().get(ORIENTATION, 1) != 1
            return fit(_rgb(ImageOps.exif_transpose(image) if turned else image), size)
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001 - PIL's readers raise whatever they stumble on: OSError, SyntaxError, struct.error
        raise ImageError(f"not a readable picture: {error}") from error


def fit(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """An RGB picture resized with its aspect so that its longer side is `size`: uint8 [h, w, 3]."""
    if isinstance(image, np.ndarray):
        if max(image.shape[:2]) == size:
            return image
        image = Image.fromarray(image)
    longer = max(image.size)
    if longer != size:
        width, height = (max(1, round(side * size / longer)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def pad(pixels: np.ndarray, size: int, mean: Sequence[float], out: np.ndarray | None = None) -> np.ndarray:
    """Centres uint8 [h, w, 3] on a square of the mean colour (0..1 a channel): uint8 [size, size, 3], written to `out` where given."""
    square = np.empty((size, size, 3), np.uint8) if out is None else out
    height, width = pixels.shape[:2]
    top, left = (size - height) // 2, (size - width) // 2
    if (height, width) != (size, size):
        ground = _ground(size, tuple(mean))
        square[:top], square[top + height :] = ground[:top], ground[top + height :]
        square[:, :left], square[:, left + width :] = ground[:, :left], ground[:, left + width :]
    square[top : top + height, left : left + width] = pixels
    return square


@functools.lru_cache(maxsize=8)
def _ground(size: int, mean: tuple[float, ...]) -> np.ndarray:
    """The square of the mean colour: numpy copies rows of one far faster than it repeats three bytes."""
    return np.broadcast_to(np.round(255 * np.asarray(mean)).astype(np.uint8), (size, size, 3)).copy()


def load(data: bytes, size: int, mean: Sequence[float], *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An encoded picture as the model takes it: uint8 [size, size, 3]. Raises ImageError."""
    return pad(decode(data, size, max_pixels=max_pixels), size, mean)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16-bit grey: PIL would clip it to white.
        values = np.asarray(image, np.float32)
        image = Image.fromarray((values / (256 if np.max(values) > 255 else 1)).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
