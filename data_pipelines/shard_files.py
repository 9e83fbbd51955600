"""Serialised records by position over the shards of a split, with a bounded number of shards
open.
"""

import bisect
import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from data_pipelines.open_files import OpenFiles
from flamingo_jax.errors import UserError
from flamingo_jax.storage import read_with_retries, storage_failure

OPTIONS = "readahead_buffer_size:0"
"""Records are read at random places: what stands behind one is not wanted."""
BUFFER_BYTES = 32_768


class Shard(NamedTuple):
    """A file's `records` of a split, from its `first` on."""

    path: str
    first: int
    records: int


def _open(path: str) -> Any:
    """An array_record reader of a file, which tells only when it is used that the file could
    not be opened. Safe to use from several threads.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path, options=OPTIONS, file_reader_buffer_size=BUFFER_BYTES)
    if not reader.ok():
        reader.read([0])
    return reader


READERS: OpenFiles[Any] = OpenFiles(_open)
"""The open shards of all datasets of this process."""


class Shards(Sequence[bytes]):
    """The records of a split as they are stored. Safe to use from several threads.

    Raises UserError where files are missing.
    """

    def __init__(self, shards: Sequence[Shard], name: str):
        self._shards = [shard for shard in shards if shard.records]
        for shard in self._shards:
            READERS.forget(shard.path)  # It may be another file by now.
        self._ends = list(itertools.accumulate(shard.records for shard in self._shards))
        folders = {pathlib.Path(shard.path).parent for shard in self._shards}
        there = {
            str(folder / file)
            for folder in folders
            for file in read_with_retries(functools.partial(_names, folder), folder)
        }
        if missing := [shard.path for shard in self._shards if shard.path not in there]:
            raise UserError(
                f"{len(missing)} of the {len(self._shards)} files of {name} are missing, such"
                f" as {missing[0]}: copy the dataset again, or build it again"
            )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, place: Any) -> Any:
        """Raises IndexError past the end, StorageError where the storage fails for long, and
        RuntimeError for bytes that are damaged.
        """
        if not 0 <= place < len(self):
            raise IndexError(f"there are {len(self)} records")
        number = bisect.bisect_right(self._ends, place)
        shard = self._shards[number]
        within = shard.first + place - (self._ends[number] - shard.records)
        return read_with_retries(lambda: _read(shard.path, within), shard.path)


def _read(path: str, place: int) -> bytes:
    try:
        return READERS.get(path).read([place])[0]
    except Exception as error:
        if storage_failure(error) is not None:
            READERS.forget(path)
        raise


def _names(folder: pathlib.Path) -> list[str]:
    return [path.name for path in folder.iterdir()]
