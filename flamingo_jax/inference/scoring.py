"""Log-likelihoods of candidate answers (paper: close-ended tasks).

A prompt is read once; its candidates share its cache.
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
      candidates: int32 [B, C, T], right-padded. lengths: int32 [B, C]; 0 where a row has no
        such candidate.
      group_size: candidates of a prompt that are read side by side, for memory; C is a multiple of
        it.

    Returns: float32 [B, C], -inf where there is no candidate. Not divided by length: the paper
      mentions no such normalisation.
    """
    rows, count, length = candidates.shape
    size = prompts.tokens.shape[1] + length
    prefilled = prefill(model, prompts, media, size)
    repeated = prefilled.repeat(group_size)

    def score(part: tuple[Array, Array]) -> Array:
        tokens, sizes = (a.reshape(rows * group_size, *a.shape[2:]) for a in part)
        real = jnp.arange(length) < sizes[:, None]
        inputs = jnp.concatenate([repeated.last[:, None], tokens[:, :-1]], axis=1)
        positions = jnp.where(real, repeated.position[:, None] + jnp.arange(length), size)
        index = jnp.broadcast_to(repeated.media_index[:, None], inputs.shape)
        logits, _ = model.decode(inputs, positions, index, media, repeated.visuals, repeated.cache)
        each = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
        total = jnp.where(real, each, 0.0).sum(axis=1)
        return jnp.where(sizes > 0, total, -jnp.inf).reshape(rows, group_size)

    def grouped(a: Array) -> Array:
        return jnp.swapaxes(a.reshape(rows, count // group_size, group_size, *a.shape[2:]), 0, 1)

    scores = jax.lax.map(score, (grouped(candidates), grouped(lengths)))
    return jnp.swapaxes(scores, 0, 1).reshape(rows, count)
