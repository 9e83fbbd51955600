"""Storage that fails: array_record's readers with errors in the very words that they have for
them, and small datasets of many shards.
"""

import collections
import errno
import io
import itertools
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image

from data_pipelines import shard_files
from data_pipelines.build import writer
from data_pipelines.build.source import SplitRecord
from data_pipelines.open_files import OpenFiles
from data_pipelines.records import UNREADABLE, open_records
from flamingo_jax import storage
from tests.data_pipelines.test_features import Given

WORDS = ["red", "blue", "green", "circle", "square", "star", "left", "right"]


def told(number: int, path: str) -> RuntimeError:
    """What array_record raises where a read fails with this errno; `test_storage` compares it
    with a real one.
    """
    return RuntimeError(
        f"pread() failed: {os.strerror(number)}; reading {path}; at byte 30454; Could not read"
        " from the underlying reader; at byte 0"
    )


class Faults:
    """Reads of shards fail where `plan(number of the read, file and place)` gives an errno.
    reads: how many there were; failed: of them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, plan: Callable[[int, str], int | None]):
        self.reads = self.failed = 0
        self.plan = plan
        real = array_record_module.ArrayRecordReader

        class Reader:
            def __init__(reader, path: str, **options: Any):
                reader.path, reader.real = path, real(path, **options)

            def ok(reader) -> bool:
                return reader.real.ok()

            def writer_options_string(reader) -> str:
                return reader.real.writer_options_string()

            def read(reader, places: list[int]) -> list[bytes]:
                self.reads += 1
                number = self.plan(self.reads, f"{pathlib.Path(reader.path).name}/{places[0]}")
                if number is not None:
                    self.failed += 1
                    raise told(number, reader.path)
                return reader.real.read(places)

        monkeypatch.setattr(array_record_module, "ArrayRecordReader", Reader)
        monkeypatch.setattr(shard_files, "READERS", OpenFiles(shard_files._open))
        monkeypatch.setattr(storage, "WAITS", (0.001, 0.002))


def now_and_then(times: int = 2, one_in: int = 3) -> Callable[[int, str], int | None]:
    """One record in so many fails as many times in a row, whichever threads ask, and well later
    again; each in another way.
    """
    kinds = [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT]
    asked: dict[str, Iterator[int]] = collections.defaultdict(itertools.count)

    def plan(read: int, record: str) -> int | None:
        drawn = zlib.crc32(record.encode())
        return (
            kinds[drawn % len(kinds)]
            if drawn % one_in == 0 and next(asked[record]) % 60 < times
            else None
        )

    return plan


def ever(number: int) -> Callable[[int, str], int | None]:
    return lambda read, record: number


def never(read: int, record: str) -> int | None:
    return None


def noise(seed: int, side: int = 8) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(
        data, "PNG"
    )
    return data.getvalue()


def records(kind: str, count: int) -> list[SplitRecord]:
    """Records of a kind with texts of very different lengths."""
    rng = np.random.default_rng(0)

    def words():
        return " ".join(rng.choice(WORDS, rng.integers(1, 12)))

    fields: dict[str, Callable[[int], dict[str, Any]]] = {
        "text": lambda i: {"text": words() + " " + words()},
        "pairs": lambda i: {"image": noise(i), "captions": [words() for _ in range(1 + i % 3)]},
        "pages": lambda i: {
            "texts": ["", *(words() for _ in range(1 + i % 2))],
            "images": [noise(2 * i + j) for j in range(1 + i % 2)],
        },
        "videos": lambda i: {
            "frames": [noise(3 * i + j) for j in range(2)],
            "fps": 1.0,
            "captions": [words()],
        },
        "questions": lambda i: {
            "frames": [noise(i // 3)],
            "question": words(),
            "answers": ["red"],
            "type": "",
        },
    }
    return [SplitRecord("train", {"id": f"{kind}{i}", **fields[kind](i)}) for i in range(count)]


def build(
    folder: pathlib.Path,
    kind: str,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
    per_shard: int = 5_000,
) -> pathlib.Path:
    """A dataset of so many records; its folder."""
    monkeypatch.setattr(writer, "RECORDS_PER_SHARD", per_shard)
    writer.write_dataset(folder / kind, Given(kind, tuple(records(kind, count))))
    return folder / kind / "1.0.0"


def hurt(
    folder: pathlib.Path, kind: str, wanted: Callable[[int], bool] = lambda place: True
) -> tuple[int, Callable[[], None]]:
    """Flips a bit of one record on disk, in the first shard; which one it is, and what flips it
    back. wanted: whether one will do.
    """
    file = min(folder.glob("*-train.array_record*"))
    whole = file.read_bytes()
    for place in range(150, 20_000, 23):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        shard_files.READERS = OpenFiles(shard_files._open)
        opened = open_records(folder, "train", kind)
        damaged = [number for number in range(len(opened)) if UNREADABLE in opened[number]]
        if len(damaged) == 1 and wanted(damaged[0]):

            def mend() -> None:
                file.write_bytes(whole)
                shard_files.READERS = OpenFiles(shard_files._open)

            return damaged[0], mend
    raise AssertionError("no single record can be hurt")
