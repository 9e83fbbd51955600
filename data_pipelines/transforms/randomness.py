"""What every random draw of the data hangs on: the seed, the dataset's name, the epoch, and
what is drawn.
"""

import hashlib

import numpy as np

from data_pipelines.transforms import augmentation
from flamingo_jax.experiment import DatasetConfig


def key(seed: int, dataset: str, epoch: int) -> str:
    """Returns one text for each (seed, dataset, epoch), whatever signs the name has.

    The name is that of the config's `data`, not the path: a dataset that is moved keeps its
    draws.
    """
    return f"{seed}/{epoch}/{dataset!r}"


def generator(what: str, seed: int, dataset: str, epoch: int) -> np.random.Generator:
    """Makes random numbers for one kind of draw (`what`, such as "order") over all of a
    dataset's epoch.

    Datasets of equal size, and different draws over one dataset, have nothing in common.
    """
    text = f"{what}/{key(seed, dataset, epoch)}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest)))


class RecordRandom:
    """What is random about one visit of a record: the same wherever, whenever and on however
    many processes it is visited.

    Each draw is a hash of its own: a generator of many numbers takes longer to set up than a
    row to make, and most rows want one or two.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        record_id: str,
        caption: tuple[int, bool] | None = None,
        *,
        dataset: str = "",
    ):
        """caption: which one, and whether a space goes before it, where that was chosen when
        rows were planned. dataset: its name.
        """
        self._key = f"{key(seed, dataset, epoch)}/{record_id}"
        self._count = 0
        self.caption = caption

    def _word(self) -> int:
        """64 random bits."""
        self._count += 1
        return int.from_bytes(
            hashlib.blake2b(f"{self._count}/{self._key}".encode(), digest_size=8).digest()
        )

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """From low up to, but not including, high."""
        return low + (high - low) * (self._word() >> 11) * 2.0**-53

    def happens(self, probability: float) -> bool:
        return probability > 0 and (probability >= 1 or self.uniform() < probability)

    def below(self, count: int) -> int:
        """One of 0..count - 1."""
        return 0 if count == 1 else self._word() * count >> 64

    def order(self, count: int) -> list[int]:
        """0..count - 1 in any order."""
        return sorted(range(count), key=lambda _: self._word())

    def augmentation(self, dataset: DatasetConfig) -> augmentation.Augmentation | None:
        """A visual's, as the dataset wants it."""
        return augmentation.draw(self.uniform, flip=dataset.flip, colour=dataset.colour)
