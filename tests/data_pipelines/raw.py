"""Small raw sources that tests write, and the records made of them."""

import json
import pathlib
import struct
import zlib
from fractions import Fraction
from typing import Any

import av
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines.build.source import Source, SplitFractions
from data_pipelines.build.writer import write_dataset

ALL_TRAIN = SplitFractions(validation=0.0)


def colourful(height: int = 80, width: int = 100, seed: int = 0) -> np.ndarray:
    """Smooth, so that JPEG changes little."""
    rows, columns = np.mgrid[0:height, 0:width]
    return (
        np.stack([rows * 2, columns * 2, (rows + columns + seed) % 256], -1)
        .clip(0, 255)
        .astype(np.uint8)
    )


def save(path: pathlib.Path, image: np.ndarray | Image.Image, **options: Any) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path.read_bytes()


def lines(path: pathlib.Path, *records: Any) -> None:
    path.write_text(
        "".join(
            (record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records
        )
    )


def huge_png(side: int) -> bytes:
    """A header that claims side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def read(folder: pathlib.Path, split: str = "train") -> dict[str, Any]:
    source = tfds.builder_from_directory(str(folder / "1.0.0")).as_data_source(split=split)
    return {source[i]["id"].decode(): source[i] for i in range(len(source))}


def accounted(
    output: pathlib.Path,
    source: Source,
    dropped: dict[str, int],
    images_dropped: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Builds a source whose `dropped` records, by reason, the test knows: the training records.

    No record may be lost without a count, nor counted for another reason: what was read is what
    was used and what was dropped, and what was used is on disk. images_dropped: of its pages.
    """
    statistics, _ = write_dataset(output, source)
    assert statistics["dropped"] == dropped
    assert statistics["records_read"] == statistics["used"] + sum(dropped.values())
    assert sum(statistics["splits"].values()) == statistics["used"]
    records = [record for split in statistics["splits"] for record in read(output, split).items()]
    assert len(records) == len(dict(records)) == statistics["used"]
    if images_dropped is not None:
        shown = sum(len(record.get("images", ())) for _, record in records)
        assert statistics["images"] == {"used": shown, "dropped": images_dropped}
    return read(output)


def strings(values: Any) -> list[str]:
    return [value.decode() for value in values]


def film(
    path: pathlib.Path,
    seconds: int,
    rate: int = 4,
    size: tuple[int, int] = (64, 96),
    codec: str = "mpeg4",
    form: str | None = None,
) -> None:
    """Second s is grey of level 40 s + 20."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt, stream.time_base = (
            *size,
            "rgb8" if codec == "gif" else "yuv420p",
            Fraction(1, rate),
        )
        for number in range(seconds * rate):
            image = np.full((*size, 3), 40 * (number // rate) + 20, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
