"""Attention: the softmax over keys that all models share, its masks, and the language model's
self-attention with positions and a key-value cache (see `cache`).

Shapes: B rows, L queries, S keys, H query heads, K key-value heads, d head width, D model
width. Scores and softmax are float32 whatever the compute dtype.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import LanguageModelConfig
from flamingo_jax.models import ops
from flamingo_jax.models.cache import Cache, Continuation
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
    """Computes softmax(query . key / sqrt(d)) . value; a query whose every key is masked gets
    exactly zero.

    Args:
      query: [B, L, H, d].
      key, value: [B, S, H, d], or [B, S, K, d] with K a divisor of H (grouped-query
        attention).
      mask: bool, broadcastable to [B, H, L, S]; True where a query attends to a key.
      extra_scores: float32 [B, H, L, S], added to query . key before the scaling by
        1 / sqrt(d).

    Returns: [B, L, H, d] in the dtype of `value`.

    The code below is the reference implementation; where the backend has a faster kernel for
    these arrays (`ops.attention_kernel`), that one runs instead.
    """
    if kernel := ops.attention_kernel(query, key, value, extra_scores):
        return kernel(query, key, value, mask, extra_scores)
    value = ops.repeat_heads(value, query)
    weights = _weights(query, ops.repeat_heads(key, query), mask, extra_scores)
    return jnp.einsum("bhls,bshd->blhd", weights.astype(value.dtype), value)


def mean_weights(query: Array, key: Array, mask: Array | None = None) -> Array:
    """Computes the weights that `attend` gives the keys, averaged over heads: float32
    [B, L, S]. A query whose every key is masked gives none to any.

    For looking at a model: no kernel of a backend returns them.
    """
    return _weights(query, ops.repeat_heads(key, query), mask).mean(1)


def _weights(
    query: Array, key: Array, mask: Array | None, extra_scores: Array | None = None
) -> Array:
    """Computes the softmax of `attend`: query [B, L, H, d], key [B, S, H, d] -> float32
    [B, H, L, S].
    """
    scores = jnp.einsum("blhd,bshd->bhls", query, key, preferred_element_type=jnp.float32)
    if extra_scores is not None:
        scores = heads_first(scores + extra_scores)
    scores = scores * (query.shape[-1] ** -0.5)
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    weights = jax.nn.softmax(jnp.where(mask, scores, ops.MASKED), axis=-1)
    # The softmax of a fully masked row is uniform, not zero.
    return jnp.where(mask, weights, 0.0)


def causal_mask(segments: Array, window: int = 0) -> Array:
    """Makes the causal mask of packed rows: int32 segments [B, L] (0 is padding) -> bool
    [B, 1, L, L]. A token attends to itself and to earlier tokens of its segment.

    window: only to the last `window` of these, itself included; 0 for all.
    """
    length = segments.shape[1]
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]
    seen = jnp.tril(jnp.ones((length, length), bool))
    if 0 < window < length:
        seen = jnp.triu(seen, 1 - window)
    return (same & seen)[:, None]


class FullAttention(nnx.Module):
    """Bidirectional multi-head self-attention with biases, as in BERT and ViT."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        shape = (width, heads, width // heads)
        self.query, self.key, self.value = (fan_in_normal(rngs, shape) for _ in range(3))
        self.query_bias, self.key_bias, self.value_bias = (
            nnx.Param(jnp.zeros(shape[1:])) for _ in range(3)
        )
        self.out = fan_in_normal(rngs, (*shape[1:], width), width)
        self.out_bias = nnx.Param(jnp.zeros((width,)))

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Attends within x [B, L, D] -> [B, L, D]. mask: bool, broadcastable to [B, H, L, L]."""
        weights = (
            (self.query, self.query_bias),
            (self.key, self.key_bias),
            (self.value, self.value_bias),
        )
        query, key, value = (add_bias(linear(x, w), b) for w, b in weights)
        return add_bias(linear(attend(query, key, value, mask), self.out, 2), self.out_bias)


class SelfAttention(nnx.Module):
    """Causal self-attention of a language model. Its config sets grouped queries, biases,
    query-key norms, a sliding window and the kind of positions.
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
        # As attributes of the attention, where checkpoints and partition rules name them.
        for name, parameter in self.positions.parameters(rngs).items():
            setattr(self, name, parameter)
        self.window = form.window

    def __call__(
        self,
        x: Array,
        positions: Array,
        packing: Packing | Continuation,
        cache: Cache | None,
    ) -> tuple[Array, Cache | None]:
        """Attends within the rows of a stream x [S, T, D] with positions int32 [S, T] ->
        [S, T, D]; or, with a cache in place of the packing, decodes rows x [B, L, D] of one
        segment each -> [B, L, D] and the cache with these tokens added.

        Tokens at positions past the cache's end are padding and are not added, nor are those of
        `Branches`: see `Continuation`.
        """
        # [S, T, D] -> query [S, T, H, d], key and value [S, T, K, d]
        query = _to_heads(x, self.query, self.query_bias, self.query_norm)
        key = _to_heads(x, self.key, self.key_bias, self.key_norm)
        value = _to_heads(x, self.value, self.value_bias, None)
        query, key = self.positions.turn(query, positions), self.positions.turn(key, positions)
        if cache is None:
            assert isinstance(packing, Packing)
            h = packing.over_rows(self._attend_within_rows, query, key, value)
        else:
            assert not isinstance(packing, Packing)
            h, cache = self._attend_cached(query, key, value, positions, cache, packing)
        h = linear(h, self.out, 2)  # [S, T, H, d] -> [S, T, D]
        return (h if self.out_bias is None else add_bias(h, self.out_bias)), cache

    def _attend_within_rows(self, query: Array, key: Array, value: Array, segments: Array) -> Array:
        """Attends causally within packed rows: query [B, L, H, d], key and value [B, L, K, d],
        segments int32 [B, L] -> [B, L, H, d].
        """
        query, scores = self.positions.score(self, query)
        return attend(query, key, value, causal_mask(segments, self.window), scores)

    def _attend_cached(
        self,
        query: Array,
        key: Array,
        value: Array,
        positions: Array,
        cache: Cache,
        continuation: Continuation,
    ) -> tuple[Array, Cache]:
        """Adds the new keys and values [B, L, K, d] to the cache and attends from the queries
        [B, L, H, d] at `positions`, int32 [B, L], to all of it -> [B, L, H, d] and the cache.
        """
        slots = cache.key.shape[2]
        keys, kept_keys = continuation.extend(cache.key, key, positions)
        values, kept_values = continuation.extend(cache.value, value, positions)
        places = continuation.places(positions, slots)
        seen = continuation.mask(positions, slots, self.window)
        distances = None if cache.distances is None else cache.distances.value
        query, scores = self.positions.score_cached(self, query, positions, places, distances)
        h = attend(query, keys, values, seen, scores)
        return h, Cache(kept_keys, kept_values, cache.distances)


def _bias(wanted: bool, *shape: int) -> nnx.Param | None:
    """Makes a bias of this shape, initially zero; None where the config has none."""
    return nnx.Param(jnp.zeros(shape)) if wanted else None


def _to_heads(
    x: Array,
    weight: nnx.Param | Weight,
    bias: nnx.Param | None,
    norm: RMSNorm | LayerNorm | None,
) -> Array:
    """Projects x [B, L, D] to queries, keys or values [B, L, H, d], with bias and norm."""
    h = save_for_backward(linear(x, weight))
    h = h if bias is None else add_bias(h, bias)
    if norm is None:
        return h
    # A scale wider than one head normalises all heads together ("width" in the config).
    whole = norm.scale.shape[-1] != h.shape[-1]
    return norm(h.reshape(*h.shape[:2], -1)).reshape(h.shape) if whole else norm(h)


def _norm_of_heads(config: LanguageModelConfig, heads: int) -> RMSNorm | LayerNorm | None:
    """Makes the query or key norm of the config; None for "none"."""
    form = config.attention
    if form.query_key_norm == "none":
        return None
    count = heads if form.query_key_norm == "width" else 1
    return make_norm(config.norm, count * form.head_width)
