"""What generation and scoring share: the model's decoding interface, and prompts read into a
cache once.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from flamingo_jax.models.attention import map_cache

Array = jax.Array


class DecodingModel(Protocol):
    """What generation asks of a model: to read some tokens more of every row. `Flamingo` is one."""

    config: Any

    def init_cache(self, batch: int, max_length: int) -> Any:
        """Makes an empty cache; the batch is at axis 1 of what is not `attention.Shared`."""

    def decode(
        self,
        tokens: Array,
        positions: Array,
        media_index: Array,
        media: Any,
        visuals: Array | None,
        cache: Any,
    ) -> tuple[Array, Any]:
        """Reads int32 [B, L] tokens at `positions` -> logits float32 [B, L, V] and the cache with
        them.
        """


class PromptArrays(NamedTuple):
    """Right-padded prompts on the device: tokens, media_index int32 [B, L]; lengths int32 [B];
    visuals int32 [B, N] or None.
    """

    tokens: Array
    media_index: Array
    lengths: Array
    visuals: Array | None


class Prefilled(NamedTuple):
    """Prompts that a model has read, all but their last token, which begins what follows.

    cache: with `size` slots. last: int32 [B], the last tokens. position: int32 [B], where they
      stand.
    media_index, visuals: what they and all that follows look at, int32 [B] and [B, N] (or
      None).
    """

    cache: Any
    last: Array
    position: Array
    media_index: Array
    visuals: Array | None

    def repeat(self, times: int) -> "Prefilled":
        """Repeats every row `times` times in a row: beams or candidates of one prompt."""
        cache = map_cache(lambda a: jnp.repeat(a, times, axis=1), self.cache)
        rows = jax.tree.map(lambda a: jnp.repeat(a, times, axis=0), self._replace(cache=None))
        return rows._replace(cache=cache)


def prefill(model: DecodingModel, prompts: PromptArrays, media: Any, size: int) -> Prefilled:
    """Reads all but the last token of every prompt into a cache of `size` slots.

    The logits of these tokens are not used, so that XLA leaves their computation out: a
    vocabulary times a prompt would be large.
    """
    rows, length = prompts.tokens.shape
    slots = jnp.arange(length)
    positions = jnp.where(slots < prompts.lengths[:, None] - 1, slots, size)
    cache = model.init_cache(rows, size)
    _, cache = model.decode(
        prompts.tokens, positions, prompts.media_index, media, prompts.visuals, cache
    )

    def last(a: Array) -> Array:
        return jnp.take_along_axis(a, prompts.lengths[:, None] - 1, axis=1)[:, 0]

    index, visuals = last(prompts.media_index), prompts.visuals
    if visuals is not None and model.config.conditioning.attend_to_media == "last":
        # What follows looks at one visual alone: the others need not be gathered at every step.
        visuals = jnp.where(
            index[:, None] >= 0,
            jnp.take_along_axis(visuals, jnp.maximum(index, 0)[:, None], axis=1),
            -1,
        )
        index = jnp.minimum(index, 0)
    return Prefilled(cache, last(prompts.tokens), prompts.lengths - 1, index, visuals)
