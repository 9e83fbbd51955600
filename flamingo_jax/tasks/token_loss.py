"""The token loss: next-token cross-entropy of packed text (paper equation 1), of one dataset
or of several in one stream.
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
    """The part of a model that the token loss needs."""

    remat: str

    def logit_parts(self, x: Array) -> tuple[Array, ...]:
        """Computes logits: hidden states [S, T, D] -> float32 [S, T, V_i] for each part i of
        the vocabulary, in the order of its ids.
        """
        ...


def token_losses(
    model: TextModel,
    x: Array,
    batches: Mapping[str, Batch],
    reduction: str,
    broken: Array | None = None,
) -> dict[str, Loss]:
    """Computes each dataset's loss from the last hidden states x [S, T, D] of their stream.

    Args:
      batches: tokens, segments int32 [B, L]; loss_mask bool [B, L], True where a token is a
        target; in the order of the datasets in the stream.
      reduction: "sequence_sum": sum over the tokens of a sequence, mean over sequences (the
        paper's equation has the sum); "token_mean": mean over tokens.
      broken: bool [S, T], tokens whose losses become NaN (see `HiddenStates`).
    """
    # Targets [B, L - 1] are padded to [B, L], so that they join to the same stream as x; the
    # last one is masked out.
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
        # The loss is a sum over tokens; metrics are averages over them.
        metrics = {"loss_per_token": (total, tokens), "accuracy": (hits, tokens)}
        found[name] = Loss(total, loss_weight(batch, reduction), metrics)
    return found


def _target_losses(
    model: TextModel, x: Array, targets: Array, counts: Array
) -> tuple[Array, Array]:
    """Computes each target's negative log-likelihood, float32 [S, T], and whether it was the
    most likely token, bool [S, T], from hidden states [S, T, D] and target ids int32 [S, T].

    The logits are recomputed in the backward pass rather than saved (unless remat is "none"),
    and stay sharded over `model` along the vocabulary.

    counts: bool [S, T]; where False the result is meaningless, and the gradient zero even if
      the state is not finite.
    """

    def losses(x: Array, targets: Array) -> tuple[Array, Array]:
        parts = model.logit_parts(all_gather(x))  # [S, T, V_i] each
        # The log of the softmax's denominator over the whole vocabulary.
        total = jax.nn.logsumexp(
            jnp.stack([jax.nn.logsumexp(part, axis=-1) for part in parts]), axis=0
        )
        best = jnp.stack([part.max(axis=-1) for part in parts]).max(axis=0)
        picked, first = jnp.zeros_like(total), 0
        for part in parts:
            # A comparison and a sum instead of a gather, which would all-gather the vocabulary
            # axis on each device.
            here = targets[..., None] == first + jnp.arange(part.shape[-1])
            picked = picked + jnp.where(here, part, 0.0).sum(-1)
            first += part.shape[-1]
        return total - picked, picked >= best

    # Masked before the arithmetic: 0 x NaN is NaN.
    x = jnp.where(counts[..., None], x, jnp.zeros((), x.dtype))
    return remat(losses, "none" if model.remat == "none" else "layers")(x, targets)


def target_mask(batch: Batch) -> Array:
    """Returns which predictions have a loss, bool [B, L - 1]; prediction l is of token l + 1,
    which must be a target and of the same segment.
    """
    segments = batch["segments"]
    return batch["loss_mask"][:, 1:] & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)


def loss_weight(batch: Batch, reduction: str) -> Array:
    """Computes the denominator of a batch's loss: its number of sequences, or of targets."""
    if reduction == "sequence_sum":
        return batch["segments"].max(axis=1).sum().astype(jnp.float32)
    return target_mask(batch).sum().astype(jnp.float32)
