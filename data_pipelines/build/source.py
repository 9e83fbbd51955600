"""What every builder is made of: a source lists its entries, and turns each into examples or
into reasons why not.
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
    """A record for a split.

    For each image that was left out of it `parts_dropped` has the reason, for each text
    (a caption, an answer, a sentence) `texts_dropped`.
    """

    split: str
    fields: dict[str, Any]
    parts_dropped: tuple[str, ...] = ()
    texts_dropped: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class DroppedRecord:
    """A source record that is not used. `parts_dropped` and `texts_dropped` as in SplitRecord."""

    reason: str
    parts_dropped: tuple[str, ...] = ()
    texts_dropped: tuple[str, ...] = ()


Converted = SplitRecord | DroppedRecord


@dataclasses.dataclass(frozen=True)
class Stream(Generic[E]):
    """Entries that are read as they are asked for, where all of them would not fit memory.
    count: about how many, for the progress bar.
    """

    count: int
    read: Callable[[], Iterator[E]]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[E]:
        return self.read()


class Source(Protocol):
    """Raw data to be written as a dataset.

    Light enough to be sent to a worker process with every few entries.
    """

    @property
    def kind(self) -> str:
        """One of `features.KINDS`."""

    @property
    def about(self) -> str:
        """One sentence for the dataset's description."""

    @property
    def options(self) -> dict[str, Any]:
        """All that its outcome depends on, as JSON values: a finished dataset is only taken for
        the same options.
        """

    @property
    def shares(self) -> "Shares | None":
        """How records are dealt to the splits; None where the source has splits of its own."""

    def entries(self) -> "Sequence[Any] | Stream[Any]":
        """What there is to read, in a fixed order. Raises UserError where there is nothing.

        `str(entry)`, or that of a tuple's last member, names it among those dropped; "" for one
        without a name.
        """

    def convert(self, entry: Any) -> list[Converted]:
        """Every source record of an entry, used or dropped; a pure function."""


@dataclasses.dataclass(frozen=True)
class Shares:
    """Parts of the records that go to validation and test; the rest is for training."""

    validation: float = 0.1
    test: float = 0.0

    @classmethod
    def whole(cls, split: str) -> "Shares":
        """All records to one split, for sources that are somebody's official split."""
        return cls(float(split == VALIDATION), float(split == TEST))

    def split(self, record_id: str) -> str:
        """By a hash of the id: the same record lands in the same split in every build."""
        digest = hashlib.blake2b(record_id.encode(), digest_size=8).digest()
        place = min(int.from_bytes(digest) / 2**64, math.nextafter(1, 0))
        if place < self.validation:
            return VALIDATION
        return TEST if place < self.validation + self.test else TRAIN

    def wanted(self) -> list[str]:
        """The splits that shall have records."""
        rest = 1 - self.validation - self.test
        parts = {TRAIN: rest, VALIDATION: self.validation, TEST: self.test}
        return [split for split, share in parts.items() if share > 1e-9]  # 1 - 0.7 - 0.3 is 6e-17.

    def lacking(self, splits: Container[str]) -> list[str]:
        """The splits that shall have records and are not among these."""
        return [split for split in self.wanted() if split not in splits]


DEFAULT_SHARES = Shares()


def record_id(folders: Sequence[str], folder: pathlib.Path, name: str) -> str:
    """Returns the name of a file in its folder, which is named too where there are several
    inputs.

    Of folders with the same name, as many of those above them are named as tell them apart.
    Bytes of a name that are no UTF-8 are written as escapes. Raises UserError where an input is
    named twice.
    """
    whole = name
    if len(folders) > 1:
        whole = f"{_labels(tuple(folders))[os.path.abspath(folder)]}/{name}"
    return whole.encode(errors="backslashreplace").decode()


@functools.lru_cache(maxsize=8)
def _labels(inputs: tuple[str, ...]) -> dict[str, str]:
    """What each folder of the inputs (or of inputs that are files) is called in ids, by path."""
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
