"""Pixels are read whatever is wrong with the metadata beside them, and what is stored is sound."""

import io
import random
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipelines.build.images import ImageRules, UnusableImage
from flamingo_jax.processing.images import ImageError, decode
from flamingo_jax.processing.metadata import without_metadata

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged entries.

ROWS, COLUMNS = np.mgrid[0:80, 0:100]
PIXELS = np.stack([ROWS * 2, COLUMNS * 2, ROWS + COLUMNS], -1).astype(np.uint8)
TURNED = 6


def encoded(form: str, **options: object) -> bytes:
    data = io.BytesIO()
    Image.fromarray(PIXELS).save(data, form, **options)
    return data.getvalue()


def exif(orientation: int) -> bytes:
    entries = Image.Exif()
    entries[0x0112] = orientation
    entries[0x010E] = "a description"
    return entries.tobytes()


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


PNG = encoded("PNG")
HEADER = 33
"""Bytes up to the end of the first chunk."""
BOMB = zlib.compress(bytes(64 << 20))
PNG_FAULTS = {
    "huge compressed text": chunk(b"zTXt", b"k\0\0" + BOMB),
    "huge international text": chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB),
    "huge profile": chunk(b"iCCP", b"k\0\0" + BOMB),
    "huge text": chunk(b"tEXt", b"k\0" + bytes(65 << 20)),
    "much text": chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 20))) * 65,
    "profile of an unknown method": chunk(b"iCCP", b"k\0\7garbage"),
    "profile of no bytes": chunk(b"iCCP", b""),
    "text of an unknown method": chunk(b"zTXt", b"k\0\5garbage"),
    "Exif that is none": chunk(b"eXIf", b"garbage"),
    "short pHYs": chunk(b"pHYs", b"\0\0"),
    "short gAMA": chunk(b"gAMA", b"\0"),
    "short cHRM": chunk(b"cHRM", b"\0\0\0"),
    "short sRGB": chunk(b"sRGB", b""),
    "short acTL": chunk(b"acTL", b"\0"),
    "fdAT of no frame": chunk(b"fdAT", b"\0"),
    "checksum of a text": chunk(b"tEXt", b"k\0hello", 1),
    "checksum of an unknown chunk": chunk(b"abCd", b"hello", 1),
    "length": struct.pack(">I", 500) + chunk(b"tEXt", b"k\0hello")[4:],
    "huge length": struct.pack(">I", 2**32 - 16) + chunk(b"tEXt", b"k\0hello")[4:],
    "cut short": chunk(b"tEXt", b"k\0hello")[:-6],
}


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("fault", PNG_FAULTS)
def test_a_png_is_read_whatever_its_metadata(fault: str, behind: bool) -> None:
    place = len(PNG) - 12 if behind else HEADER
    hurt = PNG[:place] + PNG_FAULTS[fault] + PNG[place:]
    np.testing.assert_array_equal(decode(hurt, 100), PIXELS)
    stored = ImageRules().store(hurt)
    with Image.open(io.BytesIO(stored)) as image:
        image.load()
        image.getexif()
        np.testing.assert_array_equal(np.asarray(image), PIXELS)


def test_orientation_and_transparency_outlive_other_metadata() -> None:
    seen = {}
    for name, hurt in {"whole": b"", "hurt": PNG_FAULTS["huge compressed text"]}.items():
        data = io.BytesIO()
        see_through = Image.fromarray(PIXELS).quantize(8)
        see_through.save(data, "PNG", transparency=0, exif=exif(TURNED))
        whole = data.getvalue()
        seen[name] = decode(whole[:HEADER] + hurt + whole[HEADER:], 100)
    assert seen["whole"].shape == (100, 80, 3) and (seen["whole"] == 255).all(-1).any()
    np.testing.assert_array_equal(seen["hurt"], seen["whole"])


@pytest.mark.parametrize("kind", [b"IDAT", b"IHDR"])
def test_damaged_pixels_are_still_refused(kind: bytes) -> None:
    place = PNG.index(kind) + 12
    hurt = PNG[:place] + bytes([PNG[place] ^ 4]) + PNG[place + 1 :]
    for data in (hurt, hurt[:HEADER] + PNG_FAULTS["short gAMA"] + hurt[HEADER:]):
        with pytest.raises(ImageError):
            decode(data, 100)
        with pytest.raises(UnusableImage, match="unreadable"):
            ImageRules().store(data)


JPEG_STARTS = {
    0xE0: [b"JFIF\0", b"JFXX\0"],
    0xE1: [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08", b"http://ns.adobe.com/xap/1.0/\0"],
    0xE2: [b"MPF\0", b"MPF\0MM\0*\0\0\0\x08", b"ICC_PROFILE\0"],
    0xED: [b"Photoshop 3.0\0"],
    0xFE: [b""],
}


@pytest.mark.parametrize("marker", JPEG_STARTS)
def test_a_jpeg_is_read_whatever_its_segments_hold(marker: int) -> None:
    whole = encoded("JPEG", quality=95)
    expected = decode(whole, 100)
    drawn = random.Random(marker)
    for _ in range(60):
        body = drawn.choice(JPEG_STARTS[marker]) + drawn.randbytes(drawn.choice([0, 1, 5, 30, 200]))
        segment = bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body
        hurt = whole[:2] + segment + whole[2:]
        np.testing.assert_array_equal(decode(hurt, 100), expected)
        with Image.open(io.BytesIO(ImageRules().store(hurt))) as stored:
            assert stored.getexif().get(0x0112, 1) == 1 and stored.size == (100, 80)


@pytest.mark.parametrize("form, options", [("WEBP", {"lossless": True}), ("PNG", {}), ("JPEG", {})])
def test_a_damaged_exif_entry_hides_no_pixels(form: str, options: dict[str, object]) -> None:
    whole = encoded(form, exif=exif(1), **options)
    expected = decode(whole, 100)
    start = whole.index(b"MM\0*")
    drawn = random.Random(0)
    for _ in range(60):
        hurt = bytearray(whole)
        for _ in range(drawn.choice([1, 2, 5, 20])):
            hurt[start + drawn.randrange(30)] = drawn.randrange(256)
        found = decode(bytes(hurt), 100)
        # Damage may also say another orientation.
        assert sorted(found.shape) == sorted(expected.shape) and found.sum() == expected.sum()


@pytest.mark.parametrize("cut", [1, 50, 150, 230, 300])
def test_a_webp_cut_short_behind_its_pixels_is_read(cut: int) -> None:
    entries = Image.Exif()
    entries[0x010E] = "x" * 200
    beside = {"exif": entries.tobytes(), "xmp": b"<x/>" * 50, "icc_profile": bytes(300)}
    whole = encoded("WEBP", lossless=True, **beside)
    np.testing.assert_array_equal(decode(whole[:-cut], 100), PIXELS)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_a_tiff_is_read_whatever_its_other_entries(compression: str | None) -> None:
    entries = Image.Exif()
    entries[0x010E] = "x" * 200
    entries[0x0112] = TURNED
    whole = encoded("TIFF", compression=compression, exif=entries, icc_profile=bytes(300))
    expected = decode(whole, 100)
    assert expected.shape == (100, 80, 3)
    drawn = random.Random(0)
    for tag in (0x010E, 0x8773):  # A description, a profile.
        place = whole.index(struct.pack("<H", tag), struct.unpack_from("<I", whole, 4)[0]) + 2
        for _ in range(60):
            hurt = bytearray(whole)
            for _ in range(drawn.choice([1, 2, 4])):
                hurt[place + drawn.randrange(10)] = drawn.randrange(256)
            np.testing.assert_array_equal(decode(bytes(hurt), 100), expected)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_pillow_turns_them(form: str, orientation: int) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(form, exif=exif(orientation), **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(decode(data, 100), expected)


def test_what_is_left_out_is_metadata_alone() -> None:
    for form in ("PNG", "JPEG", "WEBP", "TIFF"):
        whole = encoded(form, exif=exif(TURNED))
        assert without_metadata(encoded(form)) is not None
        np.testing.assert_array_equal(
            decode(without_metadata(whole) or b"", 100), decode(whole, 100)
        )
    assert without_metadata(b"GIF89a") is None and without_metadata(b"\xff\xd8\xff\xe1") is None


def test_a_file_of_nothing_but_broken_chunks_takes_no_time() -> None:
    hurt = PNG[:HEADER] + (struct.pack(">I", 1 << 20) + b"tEXt" + b"IDAT" * 8) * 100_000
    began = time.process_time()
    with pytest.raises(ImageError):
        decode(hurt, 100)
    assert (
        time.process_time() - began < 2
    )  # Checksums over the rest at each chunk would take 1000 s.
