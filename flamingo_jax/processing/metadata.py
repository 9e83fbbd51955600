"""Encoded images without what is not pixels: readers give up on damaged or huge metadata."""

import itertools
import re
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
"""Chunks that a PNG is decoded from (PNG specification, third edition, 11.2); tRNS is optional.
"""
JPEG_PIXELS = (0xE0, 0xEE)
"""Application segments that say how colours are coded: JFIF's and Adobe's."""
WEBP_METADATA = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}
"""Chunks of a WebP by the bit of the header's flags that announces them."""
TIFF_STARTS = {b"II*\0": "<", b"MM\0*": ">"}
TIFF_PIXELS = frozenset(
    (*range(254, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, 320)
    + (*range(322, 326), 332, 338, 339, 347, *range(512, 522), *range(529, 533))
)
"""Tags of a TIFF that say how its pixels are stored, and which way is up (TIFF 6.0)."""
EXIF_START = b"Exif\0\0"
PNG_NEXT = re.compile(rb"IHDR|PLTE|IDAT|IEND|tRNS")
SEARCHES, LOOKS = 4, 16
"""Chunks of a wrong length that are passed over in a PNG, and for each of them the places where
the
next whole one is looked for: checksums over a whole file take a while."""
JFIF_BYTES = 16
"""A shorter segment is none of JFIF's."""


def without_metadata(data: bytes) -> bytes | None:
    """Returns a PNG, JPEG, WebP or TIFF of the same pixels, with no metadata but what says
    which way is up.

    What holds the pixels is copied as it is, with its checksums. None for other formats, and
    where the image has none of the parts that it should.
    """
    parts: Iterator[bytes]
    if data.startswith(PNG_START):
        parts = _png(data)
    elif data.startswith(b"\xff\xd8"):
        parts = _jpeg(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        body = b"WEBP" + b"".join(_webp(data))
        parts = iter((b"RIFF", struct.pack("<I", len(body)), body))
    elif data[:4] in TIFF_STARTS:
        parts = _tiff(data, TIFF_STARTS[data[:4]])
    else:
        return None
    try:
        return b"".join(parts)
    except (struct.error, IndexError):
        return None


def _png(data: bytes) -> Iterator[bytes]:
    yield PNG_START
    place, searches = len(PNG_START), SEARCHES
    while place + 12 <= len(data):
        kind, end = _chunk(data, place)
        if kind in PNG_PIXELS:
            yield data[place:end]
        elif not _whole(data, place, end):
            if _broken(data, end):
                end = _next_whole(data, place + 8) if searches else len(data)
                searches -= 1
        elif kind == b"tRNS" or (kind == b"eXIf" and _readable(data[place + 8 : end - 4])):
            yield data[place:end]
        if kind == b"IEND":
            return
        place = end
    yield data[place:] if place < len(data) else b""


def _chunk(data: bytes, place: int) -> tuple[bytes, int]:
    """The kind of the chunk at a place, and where it ends."""
    (length,) = struct.unpack_from(">I", data, place)
    return data[place + 4 : place + 8], place + 12 + length


def _whole(data: bytes, place: int, end: int) -> bool:
    """Whether a chunk's checksum is its contents'."""
    return end <= len(data) and _checksum(data, place, end) == data[end - 4 : end]


def _checksum(data: bytes, place: int, end: int) -> bytes:
    return zlib.crc32(memoryview(data)[place + 4 : end - 4]).to_bytes(4)


def _broken(data: bytes, end: int) -> bool:
    """Whether no other chunk begins where one ends."""
    return re.fullmatch(rb"[A-Za-z]{4}", data[end + 4 : end + 8]) is None


def _next_whole(data: bytes, start: int) -> int:
    """Where the first whole chunk behind a damaged one begins: the end, where none is near."""
    for match in itertools.islice(PNG_NEXT.finditer(data, start), LOOKS):
        place = match.start() - 4
        if _whole(data, place, _chunk(data, place)[1]):
            return place
    return len(data)


def _jpeg(data: bytes) -> Iterator[bytes]:
    """Segments up to the scan, which is passed on to the end of the file."""
    yield data[:2]
    place = 2
    while data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # Filling.
            place += 1
            continue
        if marker == 0xDA:
            yield data[place:]
            return
        (length,) = struct.unpack_from(">H", data, place + 2)
        segment = data[place : place + 2 + length]
        exif = marker == 0xE1 and segment[4:].startswith(EXIF_START) and _readable(segment[4:])
        colours = marker in JPEG_PIXELS and (marker != 0xE0 or length >= JFIF_BYTES)
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if exif or colours or not is_metadata:
            yield segment
        place += len(segment)
    yield data[place:]


def _webp(data: bytes) -> Iterator[bytes]:
    place, chunks, flags = 12, list[bytes](), 0
    while place + 8 <= len(data):
        kind = data[place : place + 4]
        (length,) = struct.unpack_from("<I", data, place + 4)
        chunk = data[place : place + 8 + length + length % 2]
        exif = kind == b"EXIF" and len(chunk) >= 8 + length and _readable(chunk[8 : 8 + length])
        if exif or kind not in WEBP_METADATA:
            chunks.append(chunk)
            flags |= WEBP_METADATA.get(kind, 0)
        place += len(chunk)
    for chunk in chunks:
        if chunk.startswith(b"VP8X"):
            kept = chunk[8] & ~sum(WEBP_METADATA.values()) | flags
            chunk = chunk[:8] + bytes([kept]) + chunk[9:]
        yield chunk


def _tiff(data: bytes, order: str) -> Iterator[bytes]:
    """The first image's directory, in its own place, without the entries of other tags."""
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    places = range(start + 2, start + 2 + 12 * count, 12)
    entries = [data[place : place + 12] for place in places]
    kept = [one for one in entries if struct.unpack(f"{order}H", one[:2])[0] in TIFF_PIXELS]
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    yield data[:start] + directory + data[start + len(directory) :]


def _readable(exif: bytes) -> bool:
    try:
        entries = Image.Exif()
        entries.load(exif)
        return isinstance(entries.get(0x0112, 1), int)
    except Exception:  # noqa: BLE001 - PIL's reader raises whatever it stumbles on.
        return False
