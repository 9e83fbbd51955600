"""Prefill, which generation and scoring share: prompts are read into a key-value cache once.
And the decoding interface that both need of a model.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from flamingo_jax.models.cache import LINE, Continuation, map_cache

Array = jax.Array


class DecodingModel(Protocol):
    """A model with a key-value cache, such as `Flamingo`."""

    config: Any

    def init_cache(self, batch: int, slots: int, length: int | None = None) -> Any:
        """Allocates a cache for rows of `length` positions, by default as many as slots; the
        batch is axis 1 of every array that is not a `cache.SharedCache`.
        """

    def decode(
        self,
        tokens: Array,
        positions: Array,
        media_index: Array,
        media: Any,
        visuals: Array | None,
        cache: Any,
        continuation: Continuation = LINE,
        *,
        rows_own_visuals: bool = False,
    ) -> tuple[Array, Any]:
        """Decodes tokens int32 [B, L] at `positions` -> logits float32 [B, L, V], and the
        cache with these tokens added, unless they are `Branches`. See `Flamingo.decode`.
        """


class Prefix(NamedTuple):
    """The tokens that all prompts of a batch begin with, which are read once.

    cache: of one row, whose first slots have them. length: int32 [], how many they are.
    """

    cache: Any
    length: Array

    @property
    def slots(self) -> int:
        """Returns the slots of the cache: `length`, or a few more."""
        return jax.tree.leaves(self.cache)[0].shape[3]


class PromptArrays(NamedTuple):
    """Right-padded prompts on the device.

    tokens, media_index: int32 [B, L].
    lengths: int32 [B], tokens of each prompt.
    visuals: int32 [B, N], indices into the media, -1 for none; None without visuals.
    prefix: what comes before `tokens` in every prompt; None for nothing.
    """

    tokens: Array
    media_index: Array
    lengths: Array
    visuals: Array | None
    prefix: Prefix | None = None

    @property
    def slots(self) -> int:
        """Returns how many slots of a cache the prompts take."""
        return self.tokens.shape[1] + (0 if self.prefix is None else self.prefix.slots)


class Prefilled(NamedTuple):
    """Prompts in the cache, all but their last tokens, which are the first inputs of decoding.

    cache: of `size` slots.
    last: int32 [B], the prompts' last tokens. position: int32 [B], their positions.
    media_index, visuals: int32 [B] and [B, N] (or None), for the last token and all that
    follow.
    """

    cache: Any
    last: Array
    position: Array
    media_index: Array
    visuals: Array | None


def prefill(
    model: DecodingModel,
    prompts: PromptArrays,
    media: Any,
    size: int,
    length: int | None = None,
) -> Prefilled:
    """Reads all but the last token of every prompt into a cache of `size` slots, for rows of
    `length` positions in all, by default as many.

    The last token is left to the first decoding step, so that the logits here are not used and
    XLA removes their computation: prompt times vocabulary would be large.
    """
    rows, read = prompts.tokens.shape
    cache, first = model.init_cache(rows, size, length), jnp.int32(0)
    if prompts.prefix is not None:
        first, slots = prompts.prefix.length, prompts.prefix.slots
        cache = map_cache(
            lambda a, one: a.at[:, :, :, :slots].set(one), cache, prompts.prefix.cache
        )
    places = jnp.arange(read)
    # Position `size` is padding: not written to the cache.
    positions = jnp.where(places < prompts.lengths[:, None] - 1, first + places, size)
    _, cache = model.decode(
        prompts.tokens, positions, prompts.media_index, media, prompts.visuals, cache
    )

    def last(a: Array) -> Array:
        return jnp.take_along_axis(a, prompts.lengths[:, None] - 1, axis=1)[:, 0]

    index, visuals = last(prompts.media_index), prompts.visuals
    if visuals is not None and model.config.conditioning.attend_to_media == "last":
        # All further tokens attend to the prompt's last visual: the list shrinks to [B, 1], so
        # that the others are not gathered at every step.
        visuals = jnp.where(
            index[:, None] >= 0,
            jnp.take_along_axis(visuals, jnp.maximum(index, 0)[:, None], axis=1),
            -1,
        )
        index = jnp.minimum(index, 0)
    return Prefilled(cache, last(prompts.tokens), first + prompts.lengths - 1, index, visuals)


def read_prefix(model: DecodingModel, prompts: PromptArrays, media: Any) -> Prefix:
    """Reads the first of `prompts`, all of its tokens, for prompts that begin with it."""
    rows, length = prompts.tokens.shape
    places = jnp.arange(length)
    positions = jnp.where(places < prompts.lengths[:, None], places, length)
    _, cache = model.decode(
        prompts.tokens,
        positions,
        prompts.media_index,
        media,
        prompts.visuals,
        model.init_cache(rows, length),
    )
    return Prefix(map_cache(lambda a: a[:, :1], cache), prompts.lengths[0])
