"""Images keep their aspect, are padded with the mean, and bad ones are refused."""

import io

import numpy as np
import pytest
from PIL import Image

from flamingo_jax.processing import images
from flamingo_jax.processing.images import ImageError, decode, load, pad

MEAN = (0.5, 0.25, 1.0)
MEAN_PIXEL = [128, 64, 255]


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def test_wide_image_is_padded_above_and_below():
    out = load(encoded(Image.new("RGB", (80, 40), (255, 0, 0))), 32, MEAN)
    assert out.shape == (32, 32, 3) and out.dtype == np.uint8
    assert (out[8:24] == [255, 0, 0]).all()
    assert (out[:8] == MEAN_PIXEL).all() and (out[24:] == MEAN_PIXEL).all()


def test_right_size_is_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    np.testing.assert_array_equal(load(encoded(Image.fromarray(pixels)), 16, MEAN), pixels)


def test_odd_sides_and_writing_in_place():
    out = np.zeros((8, 8, 3), np.uint8)
    pad(np.full((8, 3, 3), 9, np.uint8), 8, MEAN, out=out)
    assert (
        (out[:, 2:5] == 9).all()
        and (out[:, :2] == MEAN_PIXEL).all()
        and (out[:, 5:] == MEAN_PIXEL).all()
    )


@pytest.mark.parametrize("size", [(8, 3), (5, 8), (8, 8)])
def test_views_of_pixels_are_padded_as_their_copies(size):
    """Mirrored, upside down, or with their channels first in memory."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    for view in (
        pixels[:, ::-1],
        pixels[::-1, ::-1],
        pixels[..., ::-1],
        np.moveaxis(np.moveaxis(pixels, 2, 0).copy(), 0, 2),
    ):
        np.testing.assert_array_equal(pad(view, 8, MEAN), pad(view.copy(), 8, MEAN))


@pytest.mark.parametrize(
    "image, colour",
    [
        (Image.new("L", (4, 4), 77), [77, 77, 77]),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), [255, 255, 255]),
        (Image.new("P", (4, 4), 0), None),
        (Image.new("1", (4, 4), 1), [255, 255, 255]),
        (Image.fromarray(np.full((4, 4), 128 * 256, np.uint16)), [128, 128, 128]),
    ],
)
def test_other_modes_become_rgb(image, colour):
    out = load(encoded(image), 4, MEAN)
    assert out.shape == (4, 4, 3)
    assert colour is None or (out == colour).all()


def test_cameras_rotation_is_undone():
    image = Image.new("RGB", (40, 20), (0, 0, 255))
    exif = image.getexif()
    exif[0x0112] = 6
    assert decode(encoded(image, "JPEG", exif=exif), 40).shape == (40, 20, 3)


def test_large_jpeg_has_the_colours_of_the_full_decode():
    pixels = np.zeros((600, 800, 3), np.uint8)
    pixels[:, :400] = [200, 40, 40]
    out = decode(encoded(Image.fromarray(pixels), "JPEG", quality=95), 32)
    assert out.shape == (24, 32, 3)
    assert np.abs(out[:, :14].astype(int) - [200, 40, 40]).max() < 12 and out[:, 18:].max() < 12


@pytest.mark.parametrize("cut", [0, 10, 60, 300])
def test_bytes_cut_short_are_refused(cut):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    with pytest.raises(ImageError):
        decode(encoded(Image.fromarray(pixels))[:cut], 16)


def test_too_many_pixels_are_refused_unread():
    with pytest.raises(ImageError, match="more than 99"):
        decode(encoded(Image.new("RGB", (10, 10))), 8, max_pixels=99)


def soft_waves(width: int, height: int) -> np.ndarray:
    """Soft waves, so that resizing means the same to every library."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 17 + channel) + np.cos(y / 23 - channel) for channel in range(3)]
    return np.round(127.5 + 60 * np.stack(waves, -1)).astype(np.uint8)


@pytest.mark.parametrize(("width", "height"), [(120, 80), (80, 121), (90, 90), (40, 31), (33, 300)])
def test_three_ways_to_make_a_square(width: int, height: int) -> None:
    """Against Pillow's own resize and crop, as the published preprocessors call them."""
    pixels = soft_waves(width, height)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    whole = Image.fromarray(pixels)
    size, mean = 32, (0.0, 0.5, 1.0)

    def made(how: images.Fit) -> np.ndarray:
        square = images.load(buffer.getvalue(), size, mean, how)
        assert square.shape == (size, size, 3)
        np.testing.assert_array_equal(images.pad(images.fit(pixels, size, how), size, mean), square)
        return square

    stretched = whole.resize((size, size), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(made("stretch"), stretched)
    scale = size / min(width, height)
    large = whole.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = (large.width - size) // 2, (large.height - size) // 2
    np.testing.assert_array_equal(made("crop"), large.crop((left, top, left + size, top + size)))
    if width != height:
        corner = made("pad")[0, 0] if width > height else made("pad")[-1, 0]
        np.testing.assert_array_equal(corner, [0, 128, 255])


@pytest.mark.parametrize("how", ["crop", "stretch"])
def test_a_large_jpeg_fills_the_square_at_twice_its_detail(how: images.Fit) -> None:
    """Decoded smaller, but no side to less than twice what is wanted."""
    pixels = soft_waves(1600, 900)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    found = images.decode(buffer.getvalue(), 64, how=how)
    expected = images.fit(pixels, 64, how)
    assert np.abs(found.astype(int) - expected).mean() < 1
