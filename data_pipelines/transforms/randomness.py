"""What every random draw of the data hangs on: the seed, the dataset's name, the epoch, and
what is drawn.
"""

import hashlib

import numpy as np


def key(seed: int, dataset: str, epoch: int) -> str:
    """One text for each (seed, dataset, epoch), whatever signs the name has.

    The name is that of the config's `data`, not the path: a dataset that is moved keeps its
    draws.
    """
    return f"{seed}/{epoch}/{dataset!r}"


def generator(what: str, seed: int, dataset: str, epoch: int) -> np.random.Generator:
    """Random numbers for one kind of draw (`what`, such as "order") over all of a dataset's
    epoch.

    Datasets of equal size, and different draws over one dataset, have nothing in common.
    """
    text = f"{what}/{key(seed, dataset, epoch)}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest)))
