"""Positional encodings of the language model's attention: Transformer-XL, rotary (RoPE), ALiBi
or learned, chosen by name, with one interface.

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
from flamingo_jax.models.layers import Weight, add_bias, fan_in_normal, linear
from flamingo_jax.partitioning.constraints import heads_first

Array = jax.Array


class Scored(NamedTuple):
    """The queries and extra scores that a positional encoding gives to `attention.attend`.

    query: [B, L, H, d], as multiplied with the keys.
    scores: float32, broadcastable to [B, H, L, S], added to query . key before the scaling by
      1 / sqrt(d); None for none.
    """

    query: Array
    scores: Array | None


@dataclasses.dataclass(frozen=True)
class Positions:
    """The interface of positional encodings, each method by default doing nothing.

    It has no parameters itself: those of `parameters` become attributes of the SelfAttention,
    which methods get as `attention`.
    """

    def parameters(self, rngs: nnx.Rngs) -> dict[str, nnx.Param]:
        """Makes the parameters of this kind, by the name of their attribute."""
        return {}

    def turn(self, x: Array, positions: Array) -> Array:
        """Rotates queries or keys [B, L, H, d] by their `positions`, int32 [B, L]."""
        return x

    def score(self, attention: Any, query: Array) -> Scored:
        """Computes the extra scores of queries [B, L, H, d] against the keys of the same rows.

        Distances are those within the row: a segment is contiguous, and its tokens attend only
        to each other.
        """
        return Scored(query, None)

    def score_cached(
        self, attention: Any, query: Array, positions: Array, places: Array, distances: Array | None
    ) -> Scored:
        """Computes the extra scores of queries [B, L, H, d] at `positions`, int32 [B, L],
        against keys at the positions `places`, int32 [B, S] or [1, S].

        distances: one layer's of `cached_distances`.
        """
        return Scored(query, None)

    def cached_distances(self, attention: Any, slots: int, dtype: Any) -> Array | None:
        """Computes once, for a cache of `slots` tokens, what every decoding step needs of a
        stack of attentions, [layers, ...]; None for nothing.
        """
        return None


@dataclasses.dataclass(frozen=True)
class TransformerXL(Positions):
    """Relative positions of Transformer-XL (Dai et al. 2019, section 3.3): the score of query
    i and key j is (q_i + u) . k_j + (q_i + v) . W r_(i-j), where r is sinusoidal.

    W is the parameter `position`, u `content_bias`, v `position_bias`.
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
        # Distances 0 .. L, one more than occur: see shift_distances.
        keys = self.keys(attention, query.shape[1] + 1, query.dtype)
        scores = jnp.einsum(
            "blhd,shd->bhls",
            add_bias(query, attention.position_bias),
            keys[::-1],
            preferred_element_type=jnp.float32,
        )  # [B, H, L, L + 1], column t at distance L - t
        scores = shift_distances(heads_first(scores))
        return Scored(add_bias(query, attention.content_bias), scores)

    def score_cached(
        self, attention: Any, query: Array, positions: Array, places: Array, distances: Array | None
    ) -> Scored:
        if distances is None:
            distances = self.keys(attention, places.shape[1], query.dtype)
        scores = jnp.einsum(
            "blhd,shd->bhls",
            add_bias(query, attention.position_bias),
            distances,
            preferred_element_type=jnp.float32,
        )  # [B, H, L, count] by distance; gathered to [B, H, L, S] by key:
        distance = jnp.clip(positions[:, :, None] - places[:, None], 0, distances.shape[0] - 1)
        scores = jnp.take_along_axis(scores, distance[:, None], axis=-1)
        return Scored(add_bias(query, attention.content_bias), scores)

    def keys(self, attention: Any, count: int, dtype: Any) -> Array:
        """Computes W r_n, the keys of the distances n = 0 .. count - 1: [count, H, d]."""
        return distance_keys(attention.position, count, dtype)

    def cached_distances(self, attention: Any, slots: int, dtype: Any) -> Array:
        """Computes the keys of all distances, [layers, slots, H, d]: they cost as much as a
        forward pass of the language model over dozens of tokens.
        """
        graph, stack = nnx.split(attention.position)
        return jax.lax.map(lambda w: distance_keys(nnx.merge(graph, w), slots, dtype), stack)


@dataclasses.dataclass(frozen=True)
class Rotary(Positions):
    """Rotary embeddings (RoPE, Su et al. 2021) of the first `width` values of each head; value
    i and value i + width / 2 form a pair.
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
    """Attention with linear biases (ALiBi, Press et al. 2022): slope * distance is subtracted
    from the score, with a slope for each head.
    """

    slopes: tuple[float, ...]

    def score(self, attention: Any, query: Array) -> Scored:
        places = jnp.arange(query.shape[1])
        return Scored(query, self._penalty(places[None, :, None] - places, query.shape[-1]))

    def score_cached(
        self, attention: Any, query: Array, positions: Array, places: Array, distances: Array | None
    ) -> Scored:
        distance = positions[:, :, None] - places[:, None]
        return Scored(query, self._penalty(distance, query.shape[-1]))

    def _penalty(self, distance: Array, head_width: int) -> Array:
        """Computes -slope * distance, int32 [B, L, S] -> float32 [B, H, L, S]."""
        # Times sqrt(d), which the scaling of the scores by 1 / sqrt(d) cancels.
        slopes = jnp.asarray(self.slopes, jnp.float32) * math.sqrt(head_width)
        return -slopes[:, None, None] * distance[:, None].astype(jnp.float32)


def make_positions(config: LanguageModelConfig) -> Positions:
    """Makes the positional encoding that `config.positions.kind` names. Learned positions are
    added to the embedding (`LanguageModel.add_positions`); for attention they do nothing.

    Raises: UserError for a rotary width that is not even.
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
    """Computes each head's ALiBi slope: 2^(-range / n), 2^(-2 range / n), ... for n heads.

    Where n is not a power of two: every second slope of the next power of two, then the
    others, cut to n (Press et al. 2022, in the order of MPT's code).
    """
    count = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** (-slope_range * (place + 1) / count) for place in range(count)]
    return tuple(slopes if count == heads else (slopes[1::2] + slopes[::2])[:heads])


def rotary_frequencies(half: int, base: float, scaling: RotaryScaling | None = None) -> np.ndarray:
    """Computes the rotary frequencies, radians per position for each of d / 2 pairs: float32
    [half]. scaling: for a context longer than that of the first training.
    """
    frequencies = base ** (-np.arange(half, dtype=np.float32) / half)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    # llama3: how many full turns a pair makes over the original context decides between
    # dividing its frequency by the factor (few turns) and leaving it (many).
    turns = scaling.original_length * frequencies / (2 * np.pi)
    kept = np.clip(
        (turns - scaling.low_frequency_factor)
        / (scaling.high_frequency_factor - scaling.low_frequency_factor),
        0,
        1,
    )
    return (frequencies * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


def rotate(x: Array, positions: Array, frequencies: np.ndarray) -> Array:
    """Rotates the pairs of x [B, L, H, d] by positions [B, L] * frequencies [d / 2]; value i
    and value i + d / 2 form a pair (RoPE, Su et al. 2021).
    """
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


def sinusoids(count: int, width: int) -> Array:
    """Computes the sinusoidal encoding r of the distances 0 .. count - 1, float32
    [count, width] (Dai et al. 2019, section 3.3).
    """
    frequencies = 10_000.0 ** (-np.arange(width // 2, dtype=np.float32) / (width // 2))
    angles = np.arange(count, dtype=np.float32)[:, None] * frequencies
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=-1))


def distance_keys(position: nnx.Param | Weight, count: int, dtype: Any) -> Array:
    """Computes Transformer-XL's keys W r_n of the distances n = 0 .. count - 1: `position` is
    W, [D, H, d] -> [count, H, d].
    """
    return linear(sinusoids(count, position.shape[0]).astype(dtype), position)


def shift_distances(scores: Array) -> Array:
    """Realigns scores by distance to scores by key, the relative shift of Transformer-XL:
    [..., L, L + 1], column t at distance L - t -> [..., L, L], column j of row i at distance
    i - j. Columns j > i hold arbitrary values, to be masked.
    """
    # Read as [L + 1, L], each row begins one element later than the one before: a reshape does
    # the shift, without a gather.
    *lead, length, _ = scores.shape
    return scores.reshape(*lead, length + 1, length)[..., 1:, :]
