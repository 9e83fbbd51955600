"""What every task offers the training step, and the token loss that two of them share."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

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

    def loss(self, model: Any, batch: Batch, key: Array | None) -> Loss:
        """The loss of one batch; gradients are taken of `total`."""
        ...

    def microbatches(self, batch: Batch, count: int) -> Batch:
        """The batch as parts stacked on a new first axis, over which the loss is a sum: `count`
        of them, or one that `loss` splits itself.
        """
        ...

    def without_images(self, batch: Batch) -> Batch | None:
        """The same text with every image taken away, or None where that means nothing."""
        ...

    def watch(self, trainable: dict[str, Array]) -> dict[str, Array]:
        """Parameters worth plotting as training goes, by the name they have in the metrics."""
        ...


@runtime_checkable
class StreamTask(Task, Protocol):
    """A task whose datasets can go through the model together."""

    def weight(self, batch: Batch) -> Array:
        """The `weight` of the whole batch's loss, which no parameter changes."""
        ...

    def stream_losses(
        self, model: Any, batches: dict[str, Batch], key: Array | None
    ) -> dict[str, Loss]:
        """The losses of several datasets' batches at once, equal to those of `loss` one by one."""
        ...


def token_loss(logits: Array, batch: Batch, reduction: str) -> Loss:
    """Next-token cross-entropy of packed rows.

    Args:
      logits: float32 [B, L, V]; those at l predict the token at l + 1.
      batch: tokens, segments int32 [B, L]; loss_mask bool [B, L], True where a token is a
        target.
      reduction: "sequence_sum": sum over the tokens of a sequence, mean over sequences (the
        paper's equation has the sum); "token_mean": mean over tokens.
    """
    targets, segments = batch["tokens"][:, 1:], batch["segments"]
    mask = target_mask(batch)
    # Masked before the arithmetic: 0 x NaN is NaN.
    logits = jnp.where(mask[..., None], logits[:, :-1], 0.0)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return summed_loss(losses, logits.argmax(-1) == targets, mask, segments, reduction)


def target_mask(batch: Batch) -> Array:
    """bool [B, L - 1]: which predictions count, the one at l being of the token at l + 1."""
    segments = batch["segments"]
    return batch["loss_mask"][:, 1:] & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)


def summed_loss(
    losses: Array, correct: Array, mask: Array, segments: Array, reduction: str
) -> Loss:
    """Each prediction's loss float32 and whether it is right, [B, L - 1] as `mask`, as a Loss
    of their rows.
    """
    total = jnp.where(mask, losses, 0.0).sum()
    hits, tokens = (mask & correct).sum().astype(jnp.float32), mask.sum().astype(jnp.float32)
    return Loss(
        total,
        loss_weight(mask, segments, reduction),
        {"loss_per_token": (total, tokens), "accuracy": (hits, tokens)},
    )


def loss_weight(mask: Array, segments: Array, reduction: str) -> Array:
    """What the loss of rows is divided by: the number of their sequences, or of their targets."""
    count = segments.max(axis=1).sum() if reduction == "sequence_sum" else mask.sum()
    return count.astype(jnp.float32)


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
