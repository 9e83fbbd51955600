"""Random access to serialised records across a split's ArrayRecord shards, with a bounded
number of shards open.
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
"""No readahead: records are read in random order, so the bytes after one are of no use."""
BUFFER_BYTES = 32_768


class Shard(NamedTuple):
    """A shard file: records first..first + records of it belong to the split."""

    path: str
    first: int
    records: int


def _open(path: str) -> Any:
    """Opens an ArrayRecord reader; thread-safe."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path, options=OPTIONS, file_reader_buffer_size=BUFFER_BYTES)
    if not reader.ok():
        # The constructor does not raise where the file could not be opened; a read does.
        reader.read([0])
    return reader


READERS: OpenFiles[Any] = OpenFiles(_open)
"""The open shards of all datasets of this process."""


class Shards(Sequence[bytes]):
    """Reads the serialised records of a split by index. Thread-safe.

    Raises: UserError where files are missing.
    """

    def __init__(self, shards: Sequence[Shard], name: str):
        self._shards = [shard for shard in shards if shard.records]
        for shard in self._shards:
            READERS.forget(shard.path)  # An open reader may be of a file that was replaced.
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
        """Reads one record's bytes.

        Raises: IndexError past the end; StorageError where the storage kept failing;
          RuntimeError for damaged bytes.
        """
        if not 0 <= place < len(self):
            raise IndexError(f"there are {len(self)} records")
        # `_ends` are cumulative record counts: the first end beyond `place` is the shard's.
        number = bisect.bisect_right(self._ends, place)
        shard = self._shards[number]
        within = shard.first + place - (self._ends[number] - shard.records)
        return read_with_retries(lambda: _read(shard.path, within), shard.path)


def _read(path: str, place: int) -> bytes:
    """Reads a record of a shard; after a storage error the shard is opened again next time."""
    try:
        return READERS.get(path).read([place])[0]
    except Exception as error:
        if storage_failure(error) is not None:
            READERS.forget(path)
        raise


def _names(folder: pathlib.Path) -> list[str]:
    return [path.name for path in folder.iterdir()]
