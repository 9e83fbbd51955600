"""What every builder is made of: a source lists its entries, and turns each into examples or into reasons why not."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from data_pipelines.features import TEST, TRAIN, VALIDATION

E = TypeVar("E")


@dataclasses.dataclass(frozen=True)
class Example:
    """A record for a split. `parts_dropped`: for each picture that was left out of it, the reason."""

    split: str
    fields: dict[str, Any]
    parts_dropped: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A source record that is not used. `parts_dropped` as in Example."""

    reason: str
    parts_dropped: tuple[str, ...] = ()


Outcome = Example | Dropped


@dataclasses.dataclass(frozen=True)
class Stream(Generic[E]):
    """Entries that are read as they are asked for, where all of them would not fit memory. count: about how many, for the progress bar."""

    count: int
    read: Callable[[], Iterator[E]]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[E]:
        return self.read()


class Source(Protocol):
    """Raw data to be written as a dataset. Light enough to be sent to a worker process with every few entries."""

    @property
    def kind(self) -> str:
        """One of `features.KINDS`."""

    @property
    def about(self) -> str:
        """One sentence for the dataset's description."""

    @property
    def options(self) -> dict[str, Any]:
        """All that its outcome depends on, as JSON values: a finished dataset is only taken for the same options."""

    @property
    def shares(self) -> "Shares | None":
        """How records are dealt to the splits; None where the source has splits of its own."""

    def entries(self) -> "Sequence[Any] | Stream[Any]":
        """What there is to read, in a fixed order. Raises UserError where there is nothing.

        `str(entry)`, or that of a tuple's last member, names it among those dropped; "" for one without a name.
        """

    def convert(self, entry: Any) -> list[Outcome]:
        """Every source record of an entry, used or dropped; a pure function."""


@dataclasses.dataclass(frozen=True)
class Shares:
    """Parts of the records that go to validation and test; the rest is for training."""

    validation: float = 0.1
    test: float = 0.0

    def split(self, record_id: str) -> str:
        """By a hash of the id: the same record lands in the same split in every build."""
        place = int.from_bytes(hashlib.blake2b(record_id.encode(), digest_size=8).digest()) / 2**64
        if place < self.validation:
            return VALIDATION
        return TEST if place < self.validation + self.test else TRAIN

    def lacking(self, splits: Container[str]) -> list[str]:
        """The splits that shall have records and are not among these."""
        wanted = {TRAIN: True, VALIDATION: self.validation > 0, TEST: self.test > 0}
        return [split for split, share in wanted.items() if share and split not in splits]


DEFAULT_SHARES = Shares()


def record_id(folders: Sequence[str], folder: pathlib.Path, name: str) -> str:
    """The name of a file in its folder, which is named too where there are several; bytes of a name that are no UTF-8 are written as escapes."""
    whole = name if len(folders) == 1 else f"{folder.name}/{name}"
    return whole.encode(errors="backslashreplace").decode()
