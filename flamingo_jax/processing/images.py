"""Encoded images to uint8 RGB squares, the same for training and inference.

By default their aspect is kept and they are padded with the mean colour (paper 3.2); see
`VisionConfig.image_fit` for the other ways.
"""

import functools
import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from flamingo_jax.processing.metadata import without_metadata
from flamingo_jax.storage import storage_failure

MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded: a few bytes can claim terabytes."""

ORIENTATION = 0x0112
"""The EXIF entry that says how a camera was held."""


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By what each orientation but the usual one is undone (Exif 2.32, tag 0112)."""


Fit = Literal["pad", "crop", "stretch"]
"""How an image becomes a square: see `VisionConfig.image_fit`."""


class ImageError(ValueError):
    """An image that cannot be read."""


def decode(
    data: bytes,
    size: int,
    *,
    how: Fit = "pad",
    max_pixels: int = MAX_PIXELS,
    strict: bool = False,
) -> np.ndarray:
    """Decodes an image, upright and brought to `size` as `fit` does: uint8 [h, w, 3].

    Transparent parts turn white. Metadata that is damaged or too large is passed over, unless
    `strict`. Raises ImageError where the bytes are no image, are cut short, or hold more than
    `max_pixels`.
    """
    try:
        return _decode(data, size, how, max_pixels)
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001 - PIL's readers raise whatever they stumble on: OSError, SyntaxError, struct.error
        if storage_failure(error) is not None:
            raise  # Too many files are open, or a reader of PIL's could not be loaded.
        bare = None if strict else without_metadata(data)
        if bare is None:
            raise _unreadable(error) from error
    return decode(bare, size, how=how, max_pixels=max_pixels, strict=True)


def check(data: bytes, *, max_pixels: int = MAX_PIXELS) -> None:
    """Reads an encoded image's header alone. Raises ImageError as `decode` does for it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            check_size(image.width, image.height, max_pixels)
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001 - as in `decode`, which reads it again without its metadata
        if storage_failure(error) is not None:
            raise
        if without_metadata(data) is None:
            raise _unreadable(error) from error


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raises ImageError where an image has more than `max_pixels`, or none."""
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels are more than {max_pixels}")
    if not width * height:
        raise ImageError(f"{width} x {height} pixels are none")


def _unreadable(error: Exception) -> ImageError:
    """PIL names the buffer's address where it does not know a format."""
    unknown = isinstance(error, UnidentifiedImageError)
    return ImageError(f"not a readable image: {'its format is not known' if unknown else error}")


def _decode(data: bytes, size: int, how: Fit, max_pixels: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        check_size(image.width, image.height, max_pixels)
        # JPEGs are decoded at a half, a quarter or an eighth where that still leaves twice the
        # size wanted.
        image.draft("RGB", (2 * size, 2 * size))
        image.load()  # TIFF's reader turns images itself, and forgets their orientation then.
        return fit(_upright(image), size, how)


def _upright(image: Image.Image) -> Image.Image:
    """A loaded image in RGB, turned as it was held."""
    turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    # PIL's own exif_transpose also writes the other entries anew, which fails on damaged ones.
    return _rgb(image if turn is None else image.transpose(turn))


def fit(image: Image.Image | np.ndarray, size: int, how: Fit = "pad") -> np.ndarray:
    """Resizes an RGB image: uint8 [h, w, 3].

    pad: with its aspect, so that its longer side is `size`; `pad` makes the square. crop: with
    its aspect, so that its shorter side is `size`, the middle of the other. stretch: both
    sides.
    """
    if isinstance(image, np.ndarray):
        sides = image.shape[:2]
        if (max(sides) if how == "pad" else sides) == (size if how == "pad" else (size, size)):
            return image
        image = Image.fromarray(image)
    width, height = image.size
    if how == "pad":
        longer = max(width, height)
        wanted = max(1, round(width * size / longer)), max(1, round(height * size / longer))
    elif how == "crop":
        # Rounded down, as the published preprocessors do.
        shorter = min(width, height)
        wanted = size * width // shorter, size * height // shorter
    else:
        wanted = size, size
    if image.size != wanted:
        image = image.resize(wanted, Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    if how != "crop":
        return pixels
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


_PIXEL = np.dtype("V3")


def pad(
    pixels: np.ndarray, size: int, mean: Sequence[float], out: np.ndarray | None = None
) -> np.ndarray:
    """Centres uint8 [h, w, 3] on a square of the mean colour (0..1 a channel): uint8 [size,
    size, 3], written to `out` where given.
    """
    square = np.empty((size, size, 3), np.uint8) if out is None else out
    height, width = pixels.shape[:2]
    top, left = (size - height) // 2, (size - width) // 2
    if (height, width) != (size, size):
        ground = _ground(size, tuple(mean))
        square[:top], square[top + height :] = ground[:top], ground[top + height :]
        square[:, :left], square[:, left + width :] = (
            ground[:, :left],
            ground[:, left + width :],
        )
    box = square[top : top + height, left : left + width]
    if pixels.strides[1] < 0 and pixels.strides[2] == 1:
        # A mirrored image, whole pixels at a time: its bytes would take three times as long.
        box.view(_PIXEL)[...] = pixels.view(_PIXEL)
    else:
        box[...] = pixels
    return square


@functools.lru_cache(maxsize=8)
def _ground(size: int, mean: tuple[float, ...]) -> np.ndarray:
    """The square of the mean colour: numpy copies rows of one far faster than it repeats three
    bytes.
    """
    return np.broadcast_to(
        np.round(255 * np.asarray(mean)).astype(np.uint8), (size, size, 3)
    ).copy()


def load(
    data: bytes,
    size: int,
    mean: Sequence[float],
    how: Fit = "pad",
    *,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Loads an encoded image as the model takes it: uint8 [size, size, 3]. Raises ImageError."""
    return pad(decode(data, size, how=how, max_pixels=max_pixels), size, mean)


def prepare(image: Image.Image, size: int, mean: Sequence[float], how: Fit = "pad") -> np.ndarray:
    """Prepares an image that PIL holds as the model takes it: uint8 [size, size, 3].

    Raises: ImageError where its pixels cannot be decoded.
    """
    try:
        image.load()
        return pad(fit(_upright(image), size, how), size, mean)
    except Exception as error:  # noqa: BLE001 - as in `decode`
        if storage_failure(error) is not None:
            raise
        raise _unreadable(error) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16-bit grey: PIL would clip it to white.
        values = np.asarray(image, np.float32)
        image = Image.fromarray(
            (values / (256 if np.max(values) > 255 else 1)).clip(0, 255).astype(np.uint8)
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
