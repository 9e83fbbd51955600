"""Keyed random numbers: every random draw of the data is a function of the seed, the dataset's
name, the epoch and what is drawn, never of the order in which processes or threads get to it.
"""

import hashlib

import numpy as np

from data_pipelines.transforms import augmentation
from flamingo_jax.experiment import DatasetConfig


def key(seed: int, dataset: str, epoch: int) -> str:
    """Returns a string that is unique to (seed, dataset, epoch).

    dataset: its name in the config's `data`, not its path, so that moving a dataset does not
      change its draws.
    """
    return f"{seed}/{epoch}/{dataset!r}"


def generator(what: str, seed: int, dataset: str, epoch: int) -> np.random.Generator:
    """Makes the numpy generator of one purpose (`what`, such as "order") in one epoch of a
    dataset.

    Generators of different purposes, datasets and epochs are independent.
    """
    text = f"{what}/{key(seed, dataset, epoch)}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest)))


class RecordRandom:
    """Random draws for one record in one epoch, the same on any process, thread and in any
    order.

    Each draw is a blake2b hash of the key and a counter: setting up a numpy generator takes
    longer than making a row, and most rows need one or two numbers.
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
        """Keys the draws by (seed, dataset, epoch, record_id).

        caption: (index, leading space) of the caption, where it was chosen when rows were
          packed.
        dataset: its name in the config.
        """
        self._key = f"{key(seed, dataset, epoch)}/{record_id}"
        self._count = 0
        self.caption = caption

    def _word(self) -> int:
        """Draws 64 random bits."""
        self._count += 1
        return int.from_bytes(
            hashlib.blake2b(f"{self._count}/{self._key}".encode(), digest_size=8).digest()
        )

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Draws a float from [low, high)."""
        # The top 53 bits, the precision of a float64's mantissa.
        return low + (high - low) * (self._word() >> 11) * 2.0**-53

    def happens(self, probability: float) -> bool:
        """Draws True with this probability; draws nothing for 0 and 1."""
        return probability > 0 and (probability >= 1 or self.uniform() < probability)

    def below(self, count: int) -> int:
        """Draws an integer from [0, count)."""
        return 0 if count == 1 else self._word() * count >> 64

    def order(self, count: int) -> list[int]:
        """Draws a random permutation of 0..count - 1."""
        return sorted(range(count), key=lambda _: self._word())

    def augmentation(self, dataset: DatasetConfig) -> augmentation.Augmentation | None:
        """Draws a visual's augmentation, as the dataset's config has it."""
        return augmentation.draw(self.uniform, flip=dataset.flip, colour=dataset.colour)
