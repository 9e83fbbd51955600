"""Which pictures of a source are fit to train on, and in which bytes they are stored."""

import dataclasses
import io

import numpy as np
from PIL import Image

from flamingo_jax.processing import images

JPEG_QUALITY = 95
"""Of pictures that cannot be stored as they come."""
SINGLE_COLOUR = 8
"""A picture whose channels all vary by less than this, of 255, shows nothing."""


class Unfit(ValueError):
    """A picture that is left out; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class PictureRules:
    """min_side and short_side in pixels; short_side 0 stores pictures in their own size. max_aspect is the longer side over the shorter."""

    min_side: int = 1
    max_aspect: float = 20.0
    short_side: int = 0
    max_pixels: int = images.MAX_PIXELS

    def store(self, data: bytes) -> bytes:
        """JPEG or PNG with three channels: `data` itself where it is that already, upright and not too large.

        Formats without loss become PNG, others JPEG. Raises Unfit.
        """
        try:
            with Image.open(io.BytesIO(data)) as header:
                size, mode, kind = header.size, header.mode, header.format
                turned = header.getexif().get(0x0112, 1) != 1
                lossless = kind in ("PNG", "GIF", "BMP", "TIFF", "PPM")
        except Image.DecompressionBombError as error:
            raise Unfit("too many pixels") from error
        except Exception as error:  # PIL's readers raise whatever they stumble on.
            raise Unfit("unreadable") from error
        if size[0] * size[1] > self.max_pixels:
            raise Unfit("too many pixels")
        if min(size) < self.min_side:
            raise Unfit(f"smaller than {self.min_side} pixels")
        if max(size) > self.max_aspect * min(size):
            raise Unfit(f"aspect over {self.max_aspect:g}")
        try:
            pixels = images.decode(data, max(size), max_pixels=self.max_pixels)
        except images.ImageError as error:
            raise Unfit("unreadable") from error
        if (np.ptp(pixels, axis=(0, 1)) < SINGLE_COLOUR).all():
            raise Unfit("single colour")
        large = 0 < self.short_side < min(size)
        if kind in ("JPEG", "PNG") and mode == "RGB" and not (turned or large):
            return data
        if large:
            pixels = shrink(pixels, self.short_side)
        return encode(pixels, "PNG" if lossless and not large else "JPEG")


ANY_PICTURE = PictureRules()


def shrink(pixels: np.ndarray, short_side: int) -> np.ndarray:
    """uint8 [H, W, 3] whose shorter side is at most `short_side`; 0 leaves it alone."""
    shorter, longer = sorted(pixels.shape[:2])
    return images.fit(pixels, max(1, round(longer * short_side / shorter))) if 0 < short_side < shorter else pixels


def encode(pixels: np.ndarray, form: str, quality: int = JPEG_QUALITY) -> bytes:
    """uint8 [H, W, 3] as a JPEG or PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, quality=quality)
    return file.getvalue()
