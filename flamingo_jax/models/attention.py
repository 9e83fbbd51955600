"""The one seam where attention is computed: scores, masks, positions and caches.

Shapes: B rows, L queries, S keys, H heads, d head width. Scores and softmax are in float32
  whatever the compute dtype.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import LanguageModelConfig
from flamingo_jax.models import ops
from flamingo_jax.models.layers import (
    LayerNorm,
    RMSNorm,
    Weight,
    add_bias,
    fan_in_normal,
    linear,
    make_norm,
    save_for_backward,
)
from flamingo_jax.models.packing import Packing
from flamingo_jax.models.positions import make_positions
from flamingo_jax.partitioning.constraints import heads_first

Array = jax.Array


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    extra_scores: Array | None = None,
) -> Array:
    """Softmax attention; a query whose every key is masked gets exactly zero.

    Args:
      query: [B, L, H, d]. key, value: [B, S, H, d], or [B, S, K, d] where H / K neighbouring
        queries share a head of keys and values.
      mask: bool, broadcastable to [B, H, L, S]; True where a query may look.
      extra_scores: float32 [B, H, L, S], added to query . key before the scaling by 1 /
        sqrt(d).

    Returns: [B, L, H, d] in the dtype of `value`. What follows here is the reference; where the
      backend has a faster kernel for these arrays (`ops.attention_kernel`), that computes it.
    """
    if kernel := ops.attention_kernel(query, key, value, extra_scores):
        return kernel(query, key, value, mask, extra_scores)
    key, value = ops.repeat_heads(key, query), ops.repeat_heads(value, query)
    scores = jnp.einsum("blhd,bshd->bhls", query, key, preferred_element_type=jnp.float32)
    if extra_scores is not None:
        scores = heads_first(scores + extra_scores)
    scores = scores * (query.shape[-1] ** -0.5)
    if mask is not None:
        scores = jnp.where(mask, scores, ops.MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    if mask is not None:
        weights = jnp.where(mask, weights, 0.0)
    return jnp.einsum("bhls,bshd->blhd", weights.astype(value.dtype), value)


def causal_mask(segments: Array, window: int = 0) -> Array:
    """[B, L] segment numbers (0 is padding) -> bool [B, 1, L, L]: a token sees itself and what
    comes before it in its segment.

    window: of these the last so many, itself among them; 0 for all.
    """
    length = segments.shape[1]
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]
    seen = jnp.tril(jnp.ones((length, length), bool))
    if 0 < window < length:
        seen = jnp.triu(seen, 1 - window)
    return (same & seen)[:, None]


def cached_mask(positions: Array, slots: int, window: int = 0) -> Array:
    """Makes `causal_mask` of tokens at positions [B, L] over a cache of one segment, slot s
    holding the token at position s: bool [B, 1, L, slots].
    """
    places = jnp.arange(slots)
    seen = places <= positions[:, :, None]
    if 0 < window < slots:
        seen &= places > positions[:, :, None] - window
    return seen[:, None]


def write_slots(cached: Array, new: Array, positions: Array) -> Array:
    """Puts new [B, L, ...] into the slots `positions` [B, L] of cached [B, S, ...]; what is past
    its end is dropped.
    """
    row = jnp.arange(new.shape[0])[:, None]
    return cached.at[row, positions].set(new.astype(cached.dtype), mode="drop")


class Shared(NamedTuple):
    """Part of a cache that is every row's: without a batch axis, and changed by no token."""

    value: Array


class Cache(NamedTuple):
    """Keys and values of the tokens so far; slot s holds the token at position s. key, value:
    [B, S, H, d].

    distances: Transformer-XL's keys of the distances 0 .. S - 1, [S, H, d], which are the same
      at every token.
    """

    key: Array
    value: Array
    distances: Shared | None = None


def map_cache(change: Callable[..., Array], cache: Any, *others: Any) -> Any:
    """A cache with every array that has a batch axis changed, alone or with those in its place
    of others; what rows share stays.
    """

    def is_shared(leaf: Any) -> bool:
        return isinstance(leaf, Shared)

    return jax.tree.map(
        lambda a, *b: a if is_shared(a) else change(a, *b), cache, *others, is_leaf=is_shared
    )


class FullAttention(nnx.Module):
    """Every position looks at every other; biases everywhere, as BERT and ViT have them."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        shape = (width, heads, width // heads)
        self.query, self.key, self.value = (fan_in_normal(rngs, shape) for _ in range(3))
        self.query_bias, self.key_bias, self.value_bias = (
            nnx.Param(jnp.zeros(shape[1:])) for _ in range(3)
        )
        self.out = fan_in_normal(rngs, (*shape[1:], width), width)
        self.out_bias = nnx.Param(jnp.zeros((width,)))

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """x [B, L, D], mask bool broadcastable to [B, H, L, L] -> [B, L, D]."""
        weights = (
            (self.query, self.query_bias),
            (self.key, self.key_bias),
            (self.value, self.value_bias),
        )
        query, key, value = (add_bias(linear(x, w), b) for w, b in weights)
        return add_bias(linear(attend(query, key, value, mask), self.out, 2), self.out_bias)


class SelfAttention(nnx.Module):
    """Causal self-attention of a language model: grouped queries, biases, norms of queries and
    keys, a window and positions by its config.
    """

    def __init__(self, config: LanguageModelConfig, *, out_scale: float, rngs: nnx.Rngs):
        width, form = config.width, config.attention
        heads, head_width, shared = form.heads, form.head_width, form.kv_heads or form.heads
        if heads % shared:
            raise UserError(
                f"language_model.attention has {heads} heads and {shared} kv_heads, each of which"
                " serves as many queries: make kv_heads a divisor of heads"
            )
        self.query = fan_in_normal(rngs, (width, heads, head_width))
        self.key = fan_in_normal(rngs, (width, shared, head_width))
        self.value = fan_in_normal(rngs, (width, shared, head_width))
        self.out = fan_in_normal(rngs, (heads, head_width, width), heads * head_width, out_scale)
        self.query_bias = _bias(form.bias, heads, head_width)
        self.key_bias = _bias(form.bias, shared, head_width)
        self.value_bias = _bias(form.bias, shared, head_width)
        self.out_bias = _bias(form.out_bias, width)
        self.query_norm = _norm_of_heads(config, heads)
        self.key_norm = _norm_of_heads(config, shared)
        self.positions = make_positions(config)
        for name, parameter in self.positions.parameters(rngs).items():
            setattr(self, name, parameter)
        self.window = form.window

    def __call__(
        self,
        x: Array,
        positions: Array,
        packing: Packing | None,
        cache: Cache | None,
    ) -> tuple[Array, Cache | None]:
        """A stream x [S, T, D] with positions int32 [S, T] -> [S, T, D].

        With a cache, which takes no packing, each row [B, L, D] is one segment, and tokens at
        positions past the cache's end are dropped.
        """
        query = _to_heads(x, self.query, self.query_bias, self.query_norm)
        key = _to_heads(x, self.key, self.key_bias, self.key_norm)
        value = _to_heads(x, self.value, self.value_bias, None)
        query, key = self.positions.turn(query, positions), self.positions.turn(key, positions)
        if cache is None:
            assert packing is not None
            h = packing.over_rows(self._attend_within_rows, query, key, value)
        else:
            h, cache = self._attend_cached(query, key, value, positions, cache)
        h = linear(h, self.out, 2)
        return (h if self.out_bias is None else add_bias(h, self.out_bias)), cache

    def _attend_within_rows(self, query: Array, key: Array, value: Array, segments: Array) -> Array:
        """Queries [B, L, H, d] of rows, their keys and values [B, L, K, d] -> [B, L, H, d]."""
        query, scores = self.positions.score(self, query)
        return attend(query, key, value, causal_mask(segments, self.window), scores)

    def _attend_cached(
        self, query: Array, key: Array, value: Array, positions: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        """Queries [B, L, H, d] at `positions` [B, L], to all of the cache with their own keys
        and values in it.
        """
        key = write_slots(cache.key, key, positions)
        value = write_slots(cache.value, value, positions)
        seen = cached_mask(positions, key.shape[1], self.window)
        distances = None if cache.distances is None else cache.distances.value
        query, scores = self.positions.score_cached(self, query, positions, key.shape[1], distances)
        h = attend(query, key, value, seen, scores)
        return h, cache._replace(key=key, value=value)


def _bias(wanted: bool, *shape: int) -> nnx.Param | None:
    """A bias of this shape, where the config wants one."""
    return nnx.Param(jnp.zeros(shape)) if wanted else None


def _to_heads(
    x: Array,
    weight: nnx.Param | Weight,
    bias: nnx.Param | None,
    norm: RMSNorm | LayerNorm | None,
) -> Array:
    """Queries, keys or values: [B, L, D] -> [B, L, H, d]."""
    h = save_for_backward(linear(x, weight))
    h = h if bias is None else add_bias(h, bias)
    if norm is None:
        return h
    # Of a width that is all heads': over these together.
    whole = norm.scale.shape[-1] != h.shape[-1]
    return norm(h.reshape(*h.shape[:2], -1)).reshape(h.shape) if whole else norm(h)


def _norm_of_heads(config: LanguageModelConfig, heads: int) -> RMSNorm | LayerNorm | None:
    """The norm of queries or keys that the config asks for."""
    form = config.attention
    if form.query_key_norm == "none":
        return None
    count = heads if form.query_key_norm == "width" else 1
    return make_norm(config.norm, count * form.head_width)
