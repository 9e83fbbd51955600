"""How attention knows where a token stands: Transformer-XL, rotary, alibi or learned positions,
by name and with one interface.

Shapes: B rows, L queries, S keys, H heads, d head width.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import LanguageModelConfig, RotaryScaling
from flamingo_jax.models.layers import add_bias, fan_in_normal, linear
from flamingo_jax.partitioning.constraints import heads_first

Array = jax.Array


class Scored(NamedTuple):
    """query: as it meets the keys, [B, L, H, d]. scores: what positions add to query . key before
    these are scaled by 1 / sqrt(d), float32, broadcastable to [B, H, L, S]; None for nothing.
    """

    query: Array
    scores: Array | None


@dataclasses.dataclass(frozen=True)
class Positions:
    """What every kind of positions does to attention; a kind changes what it needs to.

    Parameters belong to the attention, as its attributes; methods get it as `attention`.
    """

    def parameters(self, rngs: nnx.Rngs) -> dict[str, nnx.Param]:
        """The kind's parameters by name."""
        return {}

    def turn(self, x: Array, positions: Array) -> Array:
        """Queries or keys [B, L, H, d] that stand at `positions`, int32 [B, L]."""
        return x

    def score(self, attention: Any, query: Array) -> Scored:
        """Of queries to keys of the same rows: both stand at their places there."""
        return Scored(query, None)

    def score_cached(
        self, attention: Any, query: Array, positions: Array, slots: int, distances: Array | None
    ) -> Scored:
        """Of queries at `positions` [B, L] to a cache's slots, each of which holds the token at
        its own number. distances: those of `cached_distances`.
        """
        return Scored(query, None)

    def cached_distances(self, attention: Any, slots: int, dtype: Any) -> Array | None:
        """What all rows of a cache of so many slots share, for a stack of attentions [layers,
        ...]; None for nothing.
        """
        return None


@dataclasses.dataclass(frozen=True)
class TransformerXL(Positions):
    """Learned maps of sinusoidal distances (Dai et al. 2019, section 3.3):
    (q_i + u) . k_j + (q_i + v) . W r_(i-j).
    """

    width: int
    heads: int
    head_width: int
    bias_init: float

    def parameters(self, rngs: nnx.Rngs) -> dict[str, nnx.Param]:
        heads = (self.heads, self.head_width)
        return {
            "position": fan_in_normal(rngs, (self.width, *heads)),
            "content_bias": nnx.Param(jnp.zeros(heads)),
            "position_bias": nnx.Param(self.bias_init * jax.random.normal(rngs.params(), heads)),
        }

    def score(self, attention: Any, query: Array) -> Scored:
        # One distance more than there are: see shift_distances.
        keys = self.keys(attention, query.shape[1] + 1, query.dtype)
        scores = jnp.einsum(
            "blhd,shd->bhls",
            add_bias(query, attention.position_bias),
            keys[::-1],
            preferred_element_type=jnp.float32,
        )
        scores = shift_distances(heads_first(scores))
        return Scored(add_bias(query, attention.content_bias), scores)

    def score_cached(
        self, attention: Any, query: Array, positions: Array, slots: int, distances: Array | None
    ) -> Scored:
        keys = self.keys(attention, slots, query.dtype) if distances is None else distances
        scores = jnp.einsum(
            "blhd,shd->bhls",
            add_bias(query, attention.position_bias),
            keys,
            preferred_element_type=jnp.float32,
        )
        distance = jnp.clip(positions[:, :, None] - jnp.arange(slots), 0, slots - 1)
        scores = jnp.take_along_axis(scores, distance[:, None], axis=-1)
        return Scored(add_bias(query, attention.content_bias), scores)

    def keys(self, attention: Any, count: int, dtype: Any) -> Array:
        """W r_n, the keys of the distances n = 0 .. count - 1: [count, H, d]."""
        return distance_keys(attention.position[...], count, dtype)

    def cached_distances(self, attention: Any, slots: int, dtype: Any) -> Array:
        """The keys of all distances, [layers, slots, H, d]: they are as dear to compute as the
        language model itself is for dozens of tokens.
        """
        return jax.lax.map(lambda w: distance_keys(w, slots, dtype), attention.position[...])


@dataclasses.dataclass(frozen=True)
class Rotary(Positions):
    """Queries and keys turn with their position (Su et al. 2021), of each head the first `width`
    values; the two halves of these form the pairs.
    """

    width: int
    base: float
    scaling: RotaryScaling | None

    def turn(self, x: Array, positions: Array) -> Array:
        frequencies = rotary_frequencies(self.width // 2, self.base, self.scaling)
        if self.width == x.shape[-1]:
            return rotate(x, positions, frequencies)
        turned = rotate(x[..., : self.width], positions, frequencies)
        return jnp.concatenate([turned, x[..., self.width :]], axis=-1)


@dataclasses.dataclass(frozen=True)
class Alibi(Positions):
    """A key so many tokens before the query loses slope times as much of its score, each head
    with a slope of its own (Press et al. 2022).
    """

    slopes: tuple[float, ...]

    def score(self, attention: Any, query: Array) -> Scored:
        places = jnp.arange(query.shape[1])
        return Scored(query, self._penalty(places[None, :, None] - places, query.shape[-1]))

    def score_cached(
        self, attention: Any, query: Array, positions: Array, slots: int, distances: Array | None
    ) -> Scored:
        distance = positions[:, :, None] - jnp.arange(slots)
        return Scored(query, self._penalty(distance, query.shape[-1]))

    def _penalty(self, distance: Array, head_width: int) -> Array:
        """int32 [B, L, S] -> float32 [B, H, L, S], of scores before they are scaled."""
        slopes = jnp.asarray(self.slopes, jnp.float32) * math.sqrt(head_width)
        return -slopes[:, None, None] * distance[:, None].astype(jnp.float32)


def make_positions(config: LanguageModelConfig) -> Positions:
    """The positions that a language model's attention has by name; learned ones are the
    embedding's, and nothing to attention.

    Raises: UserError for a rotary width that is no even number.
    """
    given, attention = config.positions, config.attention
    if given.kind == "transformer_xl":
        return TransformerXL(config.width, attention.heads, attention.head_width, given.bias_init)
    if given.kind == "rotary":
        width = int(attention.head_width * given.fraction)
        if width % 2 or not width:
            raise UserError(
                f"language_model.positions turn {width} of each head's {attention.head_width}"
                " values, but values turn in pairs: choose an even attention.head_width times"
                " positions.fraction"
            )
        return Rotary(width, given.base, given.scaling)
    if given.kind == "alibi":
        return Alibi(alibi_slopes(attention.heads, given.slope_range))
    return Positions()


def alibi_slopes(heads: int, slope_range: float = 8.0) -> tuple[float, ...]:
    """Each head's slope: 2^(-range / n), 2^(-2 range / n), ... for the n heads, and where n is
    no power of two every other one of the next power's, then the others (Press et al. 2022, as
    MPT's code has it).
    """
    count = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** (-slope_range * (place + 1) / count) for place in range(count)]
    return tuple(slopes if count == heads else (slopes[1::2] + slopes[::2])[:heads])


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
