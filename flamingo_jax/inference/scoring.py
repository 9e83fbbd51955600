"""Scores candidate answers by log-likelihood (the paper's close-ended tasks). A prompt is read
once, and its candidates share the cache.
"""

from typing import Any

import jax
import jax.numpy as jnp

from flamingo_jax.inference.prefill import DecodingModel, PromptArrays, prefill

Array = jax.Array


def candidate_scores(
    model: DecodingModel,
    prompts: PromptArrays,
    media: Any,
    candidates: Array,
    lengths: Array,
    *,
    group_size: int,
) -> Array:
    """Sums the log-probabilities of each candidate's tokens after its prompt.

    Args:
      media: of `Flamingo.prepare_media`; None without visuals.
      candidates: int32 [B, C, T], right-padded.
      lengths: int32 [B, C], tokens of each; 0 for padding.
      group_size: how many candidates of each prompt are read at a time, for memory; a divisor
        of C.

    Returns: float32 [B, C], -inf for padding. Not divided by the length, a normalisation that
      the paper does not mention.
    """
    rows, count, length = candidates.shape
    size = prompts.tokens.shape[1] + length
    prefilled = prefill(model, prompts, media, size)
    repeated = prefilled.repeat(group_size)

    def score(part: tuple[Array, Array]) -> Array:
        # One group of candidates: [B, group, ...] -> [B * group, ...].
        tokens, sizes = (a.reshape(rows * group_size, *a.shape[2:]) for a in part)
        real = jnp.arange(length) < sizes[:, None]
        # Inputs are shifted by one: the prompt's last token predicts the candidate's first.
        inputs = jnp.concatenate([repeated.last[:, None], tokens[:, :-1]], axis=1)
        # Position `size` is padding: not written to the cache.
        positions = jnp.where(real, repeated.position[:, None] + jnp.arange(length), size)
        index = jnp.broadcast_to(repeated.media_index[:, None], inputs.shape)
        logits, _ = model.decode(inputs, positions, index, media, repeated.visuals, repeated.cache)
        each = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
        total = jnp.where(real, each, 0.0).sum(axis=1)
        return jnp.where(sizes > 0, total, -jnp.inf).reshape(rows, group_size)

    def grouped(a: Array) -> Array:
        return jnp.swapaxes(a.reshape(rows, count // group_size, group_size, *a.shape[2:]), 0, 1)

    # One group of candidates after the other, for memory: logits are [B * group, T, V].
    scores = jax.lax.map(score, (grouped(candidates), grouped(lengths)))
    return jnp.swapaxes(scores, 0, 1).reshape(rows, count)
