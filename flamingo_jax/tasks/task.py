"""The interface between tasks and the training step: `Task`, and the `Loss` that it returns."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array
Batch = dict[str, Array]


class Loss(NamedTuple):
    """A loss as numerator and denominator, so that microbatches are summed before the
    division.

    total, weight: float32 scalars; the loss is total / weight, or 0 where weight is 0.
    metrics: {name: (sum, weight)}, averages to be logged, accumulated in the same way.
    """

    total: Array
    weight: Array
    metrics: dict[str, tuple[Array, Array]]

    @property
    def value(self) -> Array:
        """Computes total / weight; 0 where weight is 0."""
        return self.total / divisor(self.weight)


class Task(Protocol):
    """The objective of a stage."""

    packs: bool
    """Whether the model runs on all datasets together, packed into one stream, or on each
    separately.
    """

    def losses(self, model: Any, batches: dict[str, Batch], key: Array | None) -> dict[str, Loss]:
        """Computes the loss of each dataset's batch; gradients are taken of `Loss.total`. Each
        equals the loss of its dataset alone.

        key: randomness of the step; None in evaluation.
        """
        ...

    def weight(self, batch: Batch) -> Array:
        """Computes the `Loss.weight` of the whole batch, which depends on no parameter."""
        ...

    def microbatches(self, batch: Batch, count: int) -> Batch:
        """Splits a batch into `count` parts, stacked on a new first axis, whose losses sum to
        the batch's. A task whose loss is no sum over rows makes one part, and splits it inside
        `losses`.
        """
        ...

    def without_images(self, batch: Batch) -> Batch | None:
        """Returns the same text without any image, for evaluation; None where the task has no
        such thing.
        """
        ...

    def watch(self, trainable: dict[str, Array]) -> dict[str, Array]:
        """Returns parameters to be logged at every step, by metric name."""
        ...


def divisor(weight: Array) -> Array:
    """Returns `weight` as a safe divisor: 1 where it is 0."""
    return jnp.where(weight > 0, weight, 1.0)


def split_rows(batch: Batch, count: int) -> Batch:
    """Splits every array [n, ...] into parts [count, n / count, ...]; part p has the rows p,
    p + count, p + 2 count, ...
    """
    # Strided rather than contiguous, so that each part is spread over all devices as the batch
    # is, and no row moves between them.
    return {
        name: a.reshape(a.shape[0] // count, count, *a.shape[1:]).swapaxes(0, 1)
        for name, a in batch.items()
    }
