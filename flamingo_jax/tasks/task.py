"""What every task offers the training step, and the token loss that two of them share."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array
Batch = dict[str, Array]


class Loss(NamedTuple):
    """A loss as a sum and what it is divided by, so that sums over microbatches are divided once.

    total, weight: float32 scalars; the loss is total / weight. metrics: {name: (sum, weight)}.
    """

    total: Array
    weight: Array
    metrics: dict[str, tuple[Array, Array]]


class Task(Protocol):
    """What a stage optimises."""

    def loss(self, model: Any, batch: Batch, key: Array | None) -> Loss:
        """The loss of one batch; gradients are taken of `total`."""
        ...

    def microbatches(self, batch: Batch, count: int) -> Batch:
        """The batch as parts stacked on a new first axis, over which the loss is a sum: `count` of them, or one that `loss` splits itself."""
        ...

    def without_pictures(self, batch: Batch) -> Batch | None:
        """The same text with every picture taken away, or None where that means nothing."""
        ...

    def watch(self, trainable: dict[str, Array]) -> dict[str, Array]:
        """Parameters worth plotting as training goes, by the name they have in the metrics."""
        ...


def token_loss(logits: Array, batch: Batch, reduction: str) -> Loss:
    """Next-token cross-entropy of packed rows.

    Args:
      logits: float32 [B, L, V]; those at l predict the token at l + 1.
      batch: tokens, segments int32 [B, L]; loss_mask bool [B, L], True where a token is a target.
      reduction: "sequence_sum": sum over the tokens of a sequence, mean over sequences (the paper's equation has the sum);
        "token_mean": mean over tokens.
    """
    targets, segments = batch["tokens"][:, 1:], batch["segments"]
    mask = batch["loss_mask"][:, 1:] & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    logits = logits[:, :-1]
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
    total, tokens = losses.sum(), mask.sum().astype(jnp.float32)
    sequences = segments.max(axis=1).sum().astype(jnp.float32)
    correct = jnp.where(mask, logits.argmax(-1) == targets, False).sum().astype(jnp.float32)
    weight = jnp.maximum(sequences if reduction == "sequence_sum" else tokens, 1.0)
    return Loss(total, weight, {"loss_per_token": (total, tokens), "accuracy": (correct, tokens)})


def split_rows(batch: Batch, count: int) -> Batch:
    """Every array's first axis [n, ...] as [count, n / count, ...]."""
    return {name: a.reshape(count, a.shape[0] // count, *a.shape[1:]) for name, a in batch.items()}
