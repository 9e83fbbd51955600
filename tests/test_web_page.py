"""Images of HTML pages."""

import base64
import io

import numpy as np
from PIL import Image

from flamingo_jax.web_page import strip


def shown(uri: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_frames_of_a_clip_stand_apart() -> None:
    clip = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((32, 48, 3), np.uint8)
    pixels = shown(strip(clip, 32))
    # Four of six frames, a column of white between two of them.
    assert pixels.shape == (32, 4 * 48 + 3, 3)
    assert [int(pixels[0, 49 * place, 0]) for place in range(4)] == [0, 2, 3, 5]
    assert (pixels[:, [48, 97, 146]] == 255).all()


def test_an_image_has_no_frame() -> None:
    image = np.full((1, 16, 20, 3), 7, np.uint8)
    pixels = shown(strip(image, 32))
    assert pixels.shape == (32, 40, 3) and (pixels == 7).all()
