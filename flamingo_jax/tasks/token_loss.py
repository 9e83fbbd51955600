"""The token loss: next-token cross-entropy of packed text (paper equation 1), of one dataset or
of several in one stream.
"""

from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp

from flamingo_jax.models.layers import remat
from flamingo_jax.models.packing import join, shapes_of, split
from flamingo_jax.partitioning.constraints import all_gather
from flamingo_jax.tasks.task import Batch, Loss

Array = jax.Array


class TextModel(Protocol):
    """What the token loss asks of a model."""

    remat: str

    def logit_parts(self, x: Array) -> tuple[Array, ...]:
        """Last hidden states [S, T, D] -> float32 logits [S, T, V_i] of each part of the
        vocabulary, in the order of its ids.
        """
        ...


def token_losses(
    model: TextModel,
    x: Array,
    batches: Mapping[str, Batch],
    reduction: str,
    broken: Array | None = None,
) -> dict[str, Loss]:
    """Computes each dataset's loss from the last hidden states of all, x [S, T, D].

    Args:
      batches: tokens, segments int32 [B, L]; loss_mask bool [B, L], True where a token is a
        target; dataset after dataset as in the stream.
      reduction: "sequence_sum": sum over the tokens of a sequence, mean over sequences (the
        paper's equation has the sum); "token_mean": mean over tokens.
      broken: bool [S, T], tokens whose losses are to be NaN where they count.
    """
    # One target more than there are: rows of a stream have whole lengths, and what the last
    # token is followed by counts nothing.
    one_more = ((0, 0), (0, 1))
    targets = [jnp.pad(batch["tokens"][:, 1:], one_more) for batch in batches.values()]
    masks = [jnp.pad(target_mask(batch), one_more) for batch in batches.values()]
    losses, correct = _target_losses(model, x, join(targets), join(masks))
    if broken is not None:
        losses = jnp.where(broken, jnp.nan, losses)
    found = {}
    shapes = shapes_of(targets)
    parts = zip(batches.items(), masks, split(losses, shapes), split(correct, shapes), strict=True)
    for (name, batch), mask, loss, right in parts:
        total = jnp.where(mask, loss, 0.0).sum()
        hits, tokens = (count.sum().astype(jnp.float32) for count in (mask & right, mask))
        metrics = {"loss_per_token": (total, tokens), "accuracy": (hits, tokens)}
        found[name] = Loss(total, loss_weight(batch, reduction), metrics)
    return found


def _target_losses(
    model: TextModel, x: Array, targets: Array, counts: Array
) -> tuple[Array, Array]:
    """Last hidden states [S, T, D] and target ids int32 [S, T] -> their negative log-likelihoods
    float32 and whether they were the likeliest.

    counts: bool [S, T]; what is False means nothing, and has no gradient whatever its state is.
    Without the logits of all tokens at once in memory for the gradient, and with the vocabulary
    over `model`.
    """

    def losses(x: Array, targets: Array) -> tuple[Array, Array]:
        parts = model.logit_parts(all_gather(x))
        total = jax.nn.logsumexp(
            jnp.stack([jax.nn.logsumexp(part, axis=-1) for part in parts]), axis=0
        )
        best = jnp.stack([part.max(axis=-1) for part in parts]).max(axis=0)
        picked, first = jnp.zeros_like(total), 0
        for part in parts:
            # Not a gather: that would bring the whole vocabulary to each device.
            here = targets[..., None] == first + jnp.arange(part.shape[-1])
            picked = picked + jnp.where(here, part, 0.0).sum(-1)
            first += part.shape[-1]
        return total - picked, picked >= best

    # Masked before the arithmetic: 0 x NaN is NaN.
    x = jnp.where(counts[..., None], x, jnp.zeros((), x.dtype))
    return remat(losses, "none" if model.remat == "none" else "layers")(x, targets)


def target_mask(batch: Batch) -> Array:
    """bool [B, L - 1]: which predictions count, the one at l being of the token at l + 1."""
    segments = batch["segments"]
    return batch["loss_mask"][:, 1:] & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)


def loss_weight(batch: Batch, reduction: str) -> Array:
    """What the loss of rows is divided by: the number of their sequences, or of their targets."""
    if reduction == "sequence_sum":
        return batch["segments"].max(axis=1).sum().astype(jnp.float32)
    return target_mask(batch).sum().astype(jnp.float32)
