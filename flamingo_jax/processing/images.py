"""Decodes images to uint8 RGB squares, the same in training and inference.

By default the aspect ratio is kept and images are padded with the mean colour (paper 3.2); see
`VisionConfig.image_fit` for cropping and stretching.
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
"""Larger images are refused before decoding: a file of a few bytes can declare terabytes."""

ORIENTATION = 0x0112
"""The EXIF tag of the camera's orientation."""


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the transposition that makes the image upright (Exif 2.32, tag 0112)."""


Fit = Literal["pad", "crop", "stretch"]
"""How an image becomes a square: see `VisionConfig.image_fit`."""


class ImageError(ValueError):
    """Raised for an image that cannot be decoded or is too large."""


def decode(
    data: bytes,
    size: int,
    *,
    how: Fit = "pad",
    max_pixels: int = MAX_PIXELS,
    strict: bool = False,
) -> np.ndarray:
    """Decodes an image, turns it upright and resizes it as `fit` does: uint8 [h, w, 3].

    Transparent parts become white. Damaged or oversized metadata is ignored unless `strict`.

    Raises: ImageError where the bytes are not an image, are truncated, or have more than
      `max_pixels`.
    """
    try:
        return _decode(data, size, how, max_pixels)
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001 - PIL's readers raise whatever they stumble on: OSError, SyntaxError, struct.error
        if storage_failure(error) is not None:
            raise  # Not the image's fault: too many open files, or a PIL plugin is missing.
        bare = None if strict else without_metadata(data)
        if bare is None:
            raise _unreadable(error) from error
    return decode(bare, size, how=how, max_pixels=max_pixels, strict=True)


def check(data: bytes, *, max_pixels: int = MAX_PIXELS) -> None:
    """Checks an encoded image by its header, without decoding its pixels.

    Raises: ImageError where `decode` would for the header.
    """
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
    """Raises ImageError where an image has more than `max_pixels` or no pixels."""
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels are more than {max_pixels}")
    if not width * height:
        raise ImageError(f"{width} x {height} pixels are none")


def _unreadable(error: Exception) -> ImageError:
    """Makes the ImageError for an exception of PIL's."""
    # For an unknown format PIL's message has the address of the buffer: say it in words.
    unknown = isinstance(error, UnidentifiedImageError)
    return ImageError(f"not a readable image: {'its format is not known' if unknown else error}")


def _decode(data: bytes, size: int, how: Fit, max_pixels: int) -> np.ndarray:
    """Decodes with PIL; raises whatever PIL does."""
    with Image.open(io.BytesIO(data)) as image:
        check_size(image.width, image.height, max_pixels)
        # Let libjpeg decode at 1/2, 1/4 or 1/8 scale, if at least twice the wanted size
        # remains.
        image.draft("RGB", (2 * size, 2 * size))
        # Before the EXIF is looked at: PIL turns TIFFs itself on load and drops the
        # orientation.
        image.load()
        return fit(_upright(image), size, how)


def _upright(image: Image.Image) -> Image.Image:
    """Turns a loaded image upright, by its EXIF orientation, and converts it to RGB."""
    turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    # PIL's exif_transpose would also re-encode the other EXIF tags, and fail on damaged ones.
    return _rgb(image if turn is None else image.transpose(turn))


def fit(image: Image.Image | np.ndarray, size: int, how: Fit = "pad") -> np.ndarray:
    """Resizes an RGB image (bicubic): uint8 [h, w, 3].

    how:
      pad: keeps the aspect ratio; the longer side becomes `size`. `pad` then makes the square.
      crop: keeps the aspect ratio; the shorter side becomes `size`, the longer is
        centre-cropped.
      stretch: both sides become `size`.
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
        # Rounded down, as CLIP's and other published preprocessors do.
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


# An RGB pixel as one 3-byte item.
_PIXEL = np.dtype("V3")


def pad(
    pixels: np.ndarray, size: int, mean: Sequence[float], out: np.ndarray | None = None
) -> np.ndarray:
    """Centres an image on a square of the mean colour: uint8 [size, size, 3].

    Args:
      pixels: uint8 [h, w, 3], h and w at most `size`.
      mean: the colour of the padding, 0..1 per channel.
      out: the array to write to, instead of a new one.
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
        # A mirrored view: copying whole pixels is three times as fast as copying bytes.
        box.view(_PIXEL)[...] = pixels.view(_PIXEL)
    else:
        box[...] = pixels
    return square


@functools.lru_cache(maxsize=8)
def _ground(size: int, mean: tuple[float, ...]) -> np.ndarray:
    """Makes a square of the mean colour; numpy copies its rows far faster than it broadcasts
    three bytes.
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
    """Preprocesses an encoded image for a model: uint8 [size, size, 3].

    Raises: ImageError as `decode` does.
    """
    return pad(decode(data, size, how=how, max_pixels=max_pixels), size, mean)


def prepare(image: Image.Image, size: int, mean: Sequence[float], how: Fit = "pad") -> np.ndarray:
    """Preprocesses a PIL image for a model: uint8 [size, size, 3].

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
    """Converts an image of any mode to RGB, transparent parts over white."""
    if image.mode.startswith(("I", "F")):  # Scale 16-bit grey to 8 bits: PIL would clip it.
        values = np.asarray(image, np.float32)
        image = Image.fromarray(
            (values / (256 if np.max(values) > 255 else 1)).clip(0, 255).astype(np.uint8)
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
