"""Removes the metadata of encoded images, at the level of their chunks, without re-encoding
pixels.

PIL and TensorFlow refuse to decode images with damaged or oversized metadata.
"""

import itertools
import re
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
"""Critical chunks, from which a PNG is decoded (PNG specification, third edition, 11.2)."""
JPEG_PIXELS = (0xE0, 0xEE)
"""Application segments that determine the colour space: APP0 (JFIF) and APP14 (Adobe)."""
WEBP_METADATA = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}
"""Metadata chunks of a WebP -> their bit in the flags of the VP8X header."""
TIFF_STARTS = {b"II*\0": "<", b"MM\0*": ">"}
TIFF_PIXELS = frozenset(
    (*range(254, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, 320)
    + (*range(322, 326), 332, 338, 339, 347, *range(512, 522), *range(529, 533))
)
"""TIFF tags that describe how pixels are stored, and the orientation (TIFF 6.0)."""
EXIF_START = b"Exif\0\0"
PNG_NEXT = re.compile(rb"IHDR|PLTE|IDAT|IEND|tRNS")
SEARCHES, LOOKS = 4, 16
"""How many PNG chunks with a wrong length to skip, and how many candidates for the next chunk
to try after each: every try computes a checksum, which may take over the whole file.
"""
JFIF_BYTES = 16
"""The least length of a JFIF segment; a shorter one is damaged."""


def without_metadata(data: bytes) -> bytes | None:
    """Returns a PNG, JPEG, WebP or TIFF without its metadata, except for the orientation.

    The chunks with pixels are copied byte for byte. Returns None for other formats and for
    files without the structure of their format.
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
    """Yields a PNG's critical chunks, transparency and readable EXIF."""
    yield PNG_START
    place, searches = len(PNG_START), SEARCHES
    while place + 12 <= len(data):
        kind, end = _chunk(data, place)
        if kind in PNG_PIXELS:
            yield data[place:end]
        elif not _whole(data, place, end):
            # A damaged chunk is dropped. If its length is wrong too, search for the next
            # chunk.
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
    """Reads the type and the end of the chunk at `place`."""
    (length,) = struct.unpack_from(">I", data, place)
    return data[place + 4 : place + 8], place + 12 + length


def _whole(data: bytes, place: int, end: int) -> bool:
    """Returns whether a chunk's checksum is correct."""
    return end <= len(data) and _checksum(data, place, end) == data[end - 4 : end]


def _checksum(data: bytes, place: int, end: int) -> bytes:
    return zlib.crc32(memoryview(data)[place + 4 : end - 4]).to_bytes(4)


def _broken(data: bytes, end: int) -> bool:
    """Returns whether a chunk's length is wrong: no other chunk begins where it ends."""
    return re.fullmatch(rb"[A-Za-z]{4}", data[end + 4 : end + 8]) is None


def _next_whole(data: bytes, start: int) -> int:
    """Finds the next intact chunk after a damaged one; the end if none is near."""
    for match in itertools.islice(PNG_NEXT.finditer(data, start), LOOKS):
        place = match.start() - 4
        if _whole(data, place, _chunk(data, place)[1]):
            return place
    return len(data)


def _jpeg(data: bytes) -> Iterator[bytes]:
    """Yields a JPEG without metadata segments, copying all from the scan (SOS) on."""
    yield data[:2]
    place = 2
    while data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # A fill byte before a marker.
            place += 1
            continue
        if marker == 0xDA:  # Start of scan.
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
    """Yields a WebP's chunks without metadata, and the VP8X header with matching flags."""
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
    """Yields a TIFF whose first directory, rewritten in place, has the tags of `TIFF_PIXELS`
    alone; pixel data is found by absolute offsets and must not move.
    """
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    places = range(start + 2, start + 2 + 12 * count, 12)
    entries = [data[place : place + 12] for place in places]
    kept = [one for one in entries if struct.unpack(f"{order}H", one[:2])[0] in TIFF_PIXELS]
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    yield data[:start] + directory + data[start + len(directory) :]


def _readable(exif: bytes) -> bool:
    """Returns whether PIL can read EXIF data and its orientation (tag 0x0112)."""
    try:
        entries = Image.Exif()
        entries.load(exif)
        return isinstance(entries.get(0x0112, 1), int)
    except Exception:  # noqa: BLE001 - PIL's reader raises whatever it stumbles on.
        return False
