"""The one seam where attention is computed: scores, masks, positions and caches.

Shapes: B rows, L queries, S keys, H heads, d head width. Scores and softmax are in float32
  whatever the compute dtype.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flamingo_jax.experiment import LanguageModelConfig, RotaryScaling
from flamingo_jax.models import ops
from flamingo_jax.models.layers import (
    RMSNorm,
    broadcast_param,
    fan_in_normal,
    linear,
    save_for_backward,
)
from flamingo_jax.models.packing import (
    Parts,
    as_parts,
    block_length,
    block_segments,
    join,
    shapes_of,
    split,
)
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


def rotary_frequencies(half: int, base: float, scaling: RotaryScaling | None = None) -> np.ndarray:
    """Radians a position for each of d / 2 pairs, float32 [half]."""
    frequencies = base ** (-np.arange(half, dtype=np.float32) / half)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    turns = scaling.original_length * frequencies / (2 * np.pi)
    kept = np.clip(
        (turns - scaling.low_frequency_factor)
        / (scaling.high_frequency_factor - scaling.low_frequency_factor),
        0,
        1,
    )
    return (frequencies * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


def rotate(x: Array, positions: Array, frequencies: np.ndarray) -> Array:
    """Rotary embedding (Su et al. 2021) of x [B, L, H, d] at `positions` [B, L], the two halves
    of d forming the pairs.
    """
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


def sinusoids(count: int, width: int) -> Array:
    """Sinusoidal code of the distances 0..count-1, float32 [count, width] (Dai et al. 2019,
    section 3.3).
    """
    frequencies = 10_000.0 ** (-np.arange(width // 2, dtype=np.float32) / (width // 2))
    angles = np.arange(count, dtype=np.float32)[:, None] * frequencies
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=-1))


def distance_keys(position: Array, count: int, dtype: Any) -> Array:
    """Transformer-XL's keys of the distances 0 .. count - 1 by its map [D, H, d]: [count, H,
    d].
    """
    return linear(sinusoids(count, position.shape[0]).astype(dtype), position)


def shift_distances(scores: Array) -> Array:
    """[..., L, L + 1] scores by descending distance (column t is distance L - t) -> [..., L,
    L], column j being distance i - j; j > i holds rubbish.
    """
    *lead, length, _ = scores.shape
    return scores.reshape(*lead, length + 1, length)[..., 1:, :]


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
    shared = lambda a: isinstance(a, Shared)
    return jax.tree.map(
        lambda a, *b: a if shared(a) else change(a, *b), cache, *others, is_leaf=shared
    )


def add_bias(x: Array, bias: nnx.Param) -> Array:
    return x + broadcast_param(bias[...], x)


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
        query, key, value = (add_bias(linear(x, w[...]), b) for w, b in weights)
        return add_bias(linear(attend(query, key, value, mask), self.out[...], 2), self.out_bias)


class SelfAttention(nnx.Module):
    """Causal self-attention with Transformer-XL relative positions (Dai et al. 2019) or rotary
    ones.
    """

    def __init__(self, config: LanguageModelConfig, *, out_scale: float, rngs: nnx.Rngs):
        width, form = config.width, config.attention
        heads, head_width, shared = form.heads, form.head_width, form.kv_heads or form.heads
        self.query = fan_in_normal(rngs, (width, heads, head_width))
        self.key = fan_in_normal(rngs, (width, shared, head_width))
        self.value = fan_in_normal(rngs, (width, shared, head_width))
        self.out = fan_in_normal(rngs, (heads, head_width, width), heads * head_width, out_scale)
        bias = lambda count: nnx.Param(jnp.zeros((count, head_width))) if form.bias else None
        self.query_bias, self.key_bias, self.value_bias = (
            bias(heads),
            bias(shared),
            bias(shared),
        )
        norm = lambda: (
            RMSNorm(head_width, config.norm.eps) if form.query_key_norm == "head" else None
        )
        self.query_norm, self.key_norm = norm(), norm()
        self.relative = config.positions.kind == "transformer_xl"
        if self.relative:
            self.position = fan_in_normal(rngs, (width, heads, head_width))
            self.content_bias = nnx.Param(jnp.zeros((heads, head_width)))
            self.position_bias = nnx.Param(
                config.positions.bias_init * jax.random.normal(rngs.params(), (heads, head_width))
            )
        self.rope_base, self.rope_scaling = config.positions.base, config.positions.scaling
        self.window = form.window

    def __call__(
        self,
        x: Array,
        positions: Array | Parts,
        segments: Array | Parts | None,
        cache: Cache | None,
    ) -> tuple[Array, Cache | None]:
        """x [B, L, D] -> [B, L, D], or a stream [S, T, D] whose positions and segments are one
        array for each of its parts.

        With a cache the row is one segment, and tokens at positions past its end are dropped.
        """
        maps = (
            (self.query, self.query_bias),
            (self.key, self.key_bias),
            (self.value, self.value_bias),
        )
        query, key, value = (
            save_for_backward(linear(x, w[...]))
            if b is None
            else add_bias(save_for_backward(linear(x, w[...])), b)
            for w, b in maps
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if not self.relative:
            frequencies = rotary_frequencies(
                query.shape[-1] // 2, self.rope_base, self.rope_scaling
            )
            places = join(as_parts(positions))
            query, key = rotate(query, places, frequencies), rotate(key, places, frequencies)
        if cache is None:
            assert segments is not None
            return (
                linear(self._mix_rows(query, key, value, as_parts(segments)), self.out[...], 2),
                None,
            )
        places = join(as_parts(positions))
        row = jnp.arange(x.shape[0])[:, None]
        key = cache.key.at[row, places].set(key.astype(cache.key.dtype), mode="drop")
        value = cache.value.at[row, places].set(value.astype(cache.value.dtype), mode="drop")
        slots = jnp.arange(key.shape[1])
        seen = slots <= places[:, :, None]
        if 0 < self.window < key.shape[1]:
            seen &= slots > places[:, :, None] - self.window
        h = self._mix(query, key, value, seen[:, None], places, cache.distances)
        return linear(h, self.out[...], 2), cache._replace(key=key, value=value)

    def _mix_rows(self, query: Array, key: Array, value: Array, segments: Parts) -> Array:
        """Each row within itself: [B, L, H, d], or [S, T, H, d] for the rows of several
        datasets.
        """
        if length := block_length(shapes_of(segments)):
            # In one product, and nothing is taken apart and put together again.
            blocks = lambda a: a.reshape(-1, length, *a.shape[2:])
            mask = causal_mask(blocks(block_segments(segments)), self.window)
            return self._mix(blocks(query), blocks(key), blocks(value), mask).reshape(query.shape)
        rows = zip(
            *(split(a, shapes_of(segments)) for a in (query, key, value)), segments, strict=True
        )
        return join([self._mix(q, k, v, causal_mask(part, self.window)) for q, k, v, part in rows])

    def _mix(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Array,
        cached_positions: Array | None = None,
        distances: Shared | None = None,
    ) -> Array:
        """[B, L, H, d], [B, S, K, d] twice -> [B, L, H, d].

        Where keys are a cache's: also the positions of the queries, and its distances.
        """
        if not self.relative:
            return attend(query, key, value, mask)
        if cached_positions is None:
            scores = self._position_scores(query)
        else:
            codes = (
                self.distance_keys(key.shape[1], query.dtype)
                if distances is None
                else distances.value
            )
            scores = self._cached_position_scores(query, cached_positions, codes)
        return attend(add_bias(query, self.content_bias), key, value, mask, scores)

    def distance_keys(self, count: int, dtype: Any) -> Array:
        """W r_n, Transformer-XL's keys of the distances n = 0 .. count - 1: [count, H, d]."""
        return distance_keys(self.position[...], count, dtype)

    def _position_scores(self, query: Array) -> Array:
        """(q_i + v) .

        W r_(i-j), the position part of Transformer-XL's score, query i standing at i: float32
        [B, H, L, L].
        """
        codes = self.distance_keys(query.shape[1] + 1, query.dtype)
        query = add_bias(query, self.position_bias)
        scores = jnp.einsum(
            "blhd,shd->bhls", query, codes[::-1], preferred_element_type=jnp.float32
        )
        return shift_distances(heads_first(scores))

    def _cached_position_scores(self, query: Array, positions: Array, codes: Array) -> Array:
        """The same of queries at `positions` [B, L] to the S slots of a cache: float32 [B, H,
        L, S].
        """
        query, keys = add_bias(query, self.position_bias), codes.shape[0]
        scores = jnp.einsum("blhd,shd->bhls", query, codes, preferred_element_type=jnp.float32)
        distance = jnp.clip(positions[:, :, None] - jnp.arange(keys), 0, keys - 1)
        return jnp.take_along_axis(scores, distance[:, None], axis=-1)
