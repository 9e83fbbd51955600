"""Images that are fit to be stored: in which bytes, and why others are not."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.build.images import ImageRules, UnusableImage
from tests.data_pipelines.raw import (
    colourful,
    huge_png,
    save,
)


def test_fit_images_are_stored_as_they_are(tmp_path):
    rules = ImageRules()
    for name in ("a.jpg", "a.png"):
        data = save(tmp_path / name, colourful())
        assert rules.store(data) == data


@pytest.mark.parametrize(
    "name, mode",
    [
        ("a.webp", "RGB"),
        ("b.png", "P"),
        ("c.png", "RGBA"),
        ("d.jpg", "L"),
        ("e.gif", "P"),
        ("f.jpg", "CMYK"),
        ("g.png", "1"),
    ],
)
def test_other_images_become_rgb_jpeg_or_png(tmp_path, name, mode):
    original = Image.fromarray(colourful()).convert(mode)
    stored = Image.open(io.BytesIO(ImageRules().store(save(tmp_path / name, original))))
    assert stored.mode == "RGB" and stored.size == original.size
    assert stored.format == ("PNG" if name.endswith(("png", "gif")) else "JPEG")
    assert np.abs(np.asarray(stored, float) - np.asarray(original.convert("RGB"), float)).mean() < 4


def test_turned_images_are_stored_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.open(
        io.BytesIO(
            ImageRules().store(save(tmp_path / "a.jpg", Image.fromarray(colourful()), exif=exif))
        )
    )
    assert stored.size == (80, 100) and stored.getexif().get(0x0112, 1) == 1


def test_large_images_shrink_to_the_short_side(tmp_path):
    stored = Image.open(
        io.BytesIO(ImageRules(short_side=40).store(save(tmp_path / "a.png", colourful(80, 120))))
    )
    assert stored.size == (60, 40)


def test_unfit_images_say_why(tmp_path):
    rules = ImageRules(min_side=64, max_aspect=3.0, max_pixels=1_000_000)
    whole = save(tmp_path / "a.jpg", colourful())
    cases = {
        "smaller than 64 pixels": save(tmp_path / "b.png", colourful(63, 100)),
        "aspect over 3": save(tmp_path / "c.png", colourful(70, 211)),
        "single colour": save(tmp_path / "d.png", np.full((80, 80, 3), 7, np.uint8)),
        "too many pixels": huge_png(1_001),
        "unreadable": whole[: len(whole) // 2],
    }
    for reason, data in cases.items():
        with pytest.raises(UnusableImage, match=reason):
            rules.store(data)
    for data in (b"", b"no image", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(UnusableImage, match="unreadable"):
            rules.store(data)
    with pytest.raises(UnusableImage, match="too many pixels"):
        ImageRules().store(huge_png(60_000))
