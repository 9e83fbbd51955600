"""Decides which of a source's images are fit to train on and how their bytes are stored."""

import dataclasses
import io

import numpy as np
from PIL import Image

from flamingo_jax.processing import images
from flamingo_jax.processing.metadata import without_metadata

JPEG_QUALITY = 95
"""Of images that have to be encoded again."""
LOSSLESS = ("PNG", "GIF", "BMP", "TIFF", "PPM")
SINGLE_COLOUR = 8
"""An image is dropped as blank if each channel varies by less than this, of 255."""


UNREADABLE = "unreadable"


class UnusableImage(ValueError):
    """Raised for an image that is not used; the message is the reason, as it is counted."""


@dataclasses.dataclass(frozen=True)
class ImageRules:
    """Limits on the images that are used, and the size in which they are stored.

    min_side: pixels of the shorter side, at least.
    max_aspect: longer side over shorter side, at most.
    short_side: shrink images to this shorter side, in pixels; 0 keeps their size.
    max_pixels: width x height at most.
    """

    min_side: int = 1
    max_aspect: float = 20.0
    short_side: int = 0
    max_pixels: int = images.MAX_PIXELS

    def store(self, data: bytes) -> bytes:
        """Returns the image as an upright RGB JPEG or PNG, the only formats that TFDS stores.

        An image that is one already, and not too large, is returned byte for byte. Others are
        encoded again: lossless formats as PNG, lossy and shrunk ones as JPEG. Damaged metadata
        is removed.

        Raises: UnusableImage with the reason where the image is outside the limits or unreadable.
        """
        try:
            return self._store(data)
        except UnusableImage as error:
            bare = without_metadata(data) if str(error) == UNREADABLE else None
            if bare is None:
                raise
        return self._store(bare)

    def _store(self, data: bytes) -> bytes:
        """Checks, decodes and, where needed, encodes an image again; raises UnusableImage."""
        try:
            with Image.open(io.BytesIO(data)) as header:
                self._check(*header.size)
                as_is = (
                    header.format in ("JPEG", "PNG")
                    and header.mode == "RGB"
                    and not header.has_transparency_data
                )
                as_is = (
                    as_is and header.getexif().get(images.ORIENTATION, 1) == 1
                )  # TFDS ignores the EXIF orientation, so such images are turned here.
                lossless = header.format in LOSSLESS
                longer, shorter = max(header.size), min(header.size)
            pixels = images.decode(data, longer, max_pixels=self.max_pixels, strict=True)
        except UnusableImage:
            raise
        except Image.DecompressionBombError as error:
            raise UnusableImage("too many pixels") from error
        except Exception as error:  # PIL's readers raise whatever they stumble on.
            raise UnusableImage(UNREADABLE) from error
        if (np.ptp(pixels, axis=(0, 1)) < SINGLE_COLOUR).all():
            raise UnusableImage("single colour")
        if 0 < self.short_side < shorter:
            return encode(shrink(pixels, self.short_side), "JPEG")
        return data if as_is else encode(pixels, "PNG" if lossless else "JPEG")

    def _check(self, width: int, height: int) -> None:
        """Checks an image's size, before it is decoded."""
        if width * height > self.max_pixels:
            raise UnusableImage("too many pixels")
        if min(width, height) < self.min_side:
            raise UnusableImage(f"smaller than {self.min_side} pixels")
        if max(width, height) > self.max_aspect * min(width, height):
            raise UnusableImage(f"aspect over {self.max_aspect:g}")


ANY_IMAGE = ImageRules()


def shrink(pixels: np.ndarray, short_side: int) -> np.ndarray:
    """Shrinks an image to uint8 [H, W, 3] whose shorter side is at most `short_side`; 0 leaves
    it alone.
    """
    shorter, longer = sorted(pixels.shape[:2])
    return (
        images.fit(pixels, max(1, round(longer * short_side / shorter)))
        if 0 < short_side < shorter
        else pixels
    )


def encode(pixels: np.ndarray, form: str, quality: int = JPEG_QUALITY) -> bytes:
    """Encodes uint8 [H, W, 3] as a JPEG or PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, quality=quality)
    return file.getvalue()
