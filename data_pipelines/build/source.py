"""The interface of a source of raw data: it lists entries and converts each to records, or to
the reasons why they were dropped. Read this first to add a source.
"""

import collections
import dataclasses
import functools
import hashlib
import math
import os
import pathlib
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from data_pipelines.features import TEST, TRAIN, VALIDATION
from flamingo_jax.errors import UserError

E = TypeVar("E")


@dataclasses.dataclass(frozen=True)
class SplitRecord:
    """A record and the split that it belongs to.

    fields: by the features of its kind (`features.py`), images encoded.
    parts_dropped: the reason for each image that was left out of it.
    texts_dropped: the reason for each caption, answer or sentence that was left out.
    """

    split: str
    fields: dict[str, Any]
    parts_dropped: tuple[str, ...] = ()
    texts_dropped: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class DroppedRecord:
    """A source record that is not used, with the reason under which it is counted."""

    reason: str
    parts_dropped: tuple[str, ...] = ()
    texts_dropped: tuple[str, ...] = ()


Converted = SplitRecord | DroppedRecord
"""The outcome of a source record."""


@dataclasses.dataclass(frozen=True)
class Stream(Generic[E]):
    """Entries that are read lazily, for sources that are too large for a list in memory.

    count: their approximate number, for the progress bar.
    read: starts a new iteration.
    """

    count: int
    read: Callable[[], Iterator[E]]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[E]:
        return self.read()


class Source(Protocol):
    """Raw data that `writer.write_dataset` writes as a TFDS dataset.

    A source is pickled and sent to worker processes repeatedly, so it must be small.
    """

    @property
    def kind(self) -> str:
        """Returns the kind of its records, one of `features.KINDS`."""

    @property
    def about(self) -> str:
        """Returns one sentence for the dataset's description."""

    @property
    def options(self) -> dict[str, Any]:
        """Returns everything that the output depends on, as JSON values. A finished dataset is
        reused only if its options are equal.
        """

    @property
    def shares(self) -> "SplitFractions | None":
        """Returns the fractions of the splits; None where the source has its own splits."""

    def entries(self) -> "Sequence[Any] | Stream[Any]":
        """Lists the units of work, such as files, in a fixed order.

        `str(entry)`, or of a tuple its last item, names the entry in the list of dropped
        records; "" for no name.

        Raises: UserError where there are none.
        """

    def convert(self, entry: Any) -> list[Converted]:
        """Converts all source records of an entry. A pure function that runs in worker
        processes; every source record must be in the result, used or dropped.
        """


@dataclasses.dataclass(frozen=True)
class SplitFractions:
    """Fractions of the records in the validation and test splits; the rest is for training."""

    validation: float = 0.1
    test: float = 0.0

    @classmethod
    def whole(cls, split: str) -> "SplitFractions":
        """Puts all records into one split, for a source that is an official split already."""
        return cls(float(split == VALIDATION), float(split == TEST))

    def split(self, record_id: str) -> str:
        """Chooses a record's split by a hash of its id: the same split in every build."""
        digest = hashlib.blake2b(record_id.encode(), digest_size=8).digest()
        # In [0, 1): the division may round up to 1.
        place = min(int.from_bytes(digest) / 2**64, math.nextafter(1, 0))
        if place < self.validation:
            return VALIDATION
        return TEST if place < self.validation + self.test else TRAIN

    def wanted(self) -> list[str]:
        """Returns the splits with a nonzero fraction."""
        rest = 1 - self.validation - self.test
        parts = {TRAIN: rest, VALIDATION: self.validation, TEST: self.test}
        return [split for split, share in parts.items() if share > 1e-9]  # 1 - 0.7 - 0.3 is 6e-17.

    def lacking(self, splits: Container[str]) -> list[str]:
        """Returns the splits with a nonzero fraction that are not among `splits`."""
        return [split for split in self.wanted() if split not in splits]


DEFAULT_SHARES = SplitFractions()


def record_id(folders: Sequence[str], folder: pathlib.Path, name: str) -> str:
    """Returns a record's id: the name of its file relative to its input folder.

    With several inputs the folder's name is put in front, with as many of its parents as
    needed to distinguish folders of the same name. Invalid UTF-8 is escaped.

    Raises: UserError where two inputs are the same folder.
    """
    whole = name
    if len(folders) > 1:
        whole = f"{_labels(tuple(folders))[os.path.abspath(folder)]}/{name}"
    return whole.encode(errors="backslashreplace").decode()


@functools.lru_cache(maxsize=8)
def _labels(inputs: tuple[str, ...]) -> dict[str, str]:
    """Returns {absolute path of an input's folder: its name in ids}."""
    paths = [os.path.abspath(name) for name in inputs]
    counts = collections.Counter(map(os.path.realpath, paths))
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"--input names {twice[0]} twice: name each input once")
    folders = {path if os.path.isdir(path) else os.path.dirname(path) for path in paths}
    parts = {folder: pathlib.Path(folder).parts for folder in folders}
    labels = {}
    for folder, names in parts.items():
        depth = 1
        while depth < len(names) and any(
            other != folder and theirs[-depth:] == names[-depth:] for other, theirs in parts.items()
        ):
            depth += 1
        labels[folder] = "/".join(names[-depth:]).lstrip("/")
    return labels
