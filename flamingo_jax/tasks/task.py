"""What every task offers the training step."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array
Batch = dict[str, Array]


class Loss(NamedTuple):
    """A loss as a sum and what it is divided by, so that sums over microbatches are divided
    once.

    total, weight: float32 scalars; the loss is total / weight, and 0 where nothing has weight:
    what one part lacks must not count as one in the sum of all. metrics: {name: (sum, weight)}.
    """

    total: Array
    weight: Array
    metrics: dict[str, tuple[Array, Array]]

    @property
    def value(self) -> Array:
        """The loss."""
        return self.total / divisor(self.weight)


class Task(Protocol):
    """What a stage optimises."""

    packs: bool
    """Whether datasets go through the model together, as one stream; else each alone."""

    def losses(self, model: Any, batches: dict[str, Batch], key: Array | None) -> dict[str, Loss]:
        """The loss of each dataset's batch; gradients are taken of `total`. Together they are
        what each is alone.
        """
        ...

    def weight(self, batch: Batch) -> Array:
        """The `weight` of the whole batch's loss, which no parameter changes."""
        ...

    def microbatches(self, batch: Batch, count: int) -> Batch:
        """The batch as parts stacked on a new first axis, over which the loss is a sum: `count`
        of them, or one that `losses` splits itself.
        """
        ...

    def without_images(self, batch: Batch) -> Batch | None:
        """The same text with every image taken away, or None where that means nothing."""
        ...

    def watch(self, trainable: dict[str, Array]) -> dict[str, Array]:
        """Parameters worth plotting as training goes, by the name they have in the metrics."""
        ...


def divisor(weight: Array) -> Array:
    """A sum of weights as what to divide by: 1 where there is none."""
    return jnp.where(weight > 0, weight, 1.0)


def split_rows(batch: Batch, count: int) -> Batch:
    """Every array's first axis [n, ...] as [count, n / count, ...], part p having every
    count-th row from row p on.
    """
    # Not runs of rows: each device then has its share of every part.
    return {
        name: a.reshape(a.shape[0] // count, count, *a.shape[1:]).swapaxes(0, 1)
        for name, a in batch.items()
    }
