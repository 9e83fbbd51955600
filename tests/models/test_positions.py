"""Positions: rotary turns, their published frequencies, alibi's slopes, learned vectors."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import (
    AttentionConfig,
    FeedForwardConfig,
    LanguageModelConfig,
    PositionsConfig,
    RotaryScaling,
)
from flamingo_jax.models.attention import SelfAttention
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.models.positions import (
    Rotary,
    alibi_slopes,
    make_positions,
    rotary_frequencies,
    rotate,
)
from tests.models.filling import filled
from tests.rounding import assert_close

CONFIG = LanguageModelConfig(
    vocab_size=7,
    layers=1,
    width=8,
    attention=AttentionConfig(heads=2, head_width=4),
    feed_forward=FeedForwardConfig(width=8),
)


def test_rotation_keeps_scores_a_function_of_distance() -> None:
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(i: int, j: int) -> float:
        turned = (
            rotate(x, jnp.array([[place]]), rotary_frequencies(4, 1e4))
            for x, place in ((q, i), (k, j))
        )
        return float(jnp.sum(next(turned) * next(turned)))

    # Eight products; angles up to 12 are as near as their last place.
    assert_close(
        score(5, 3),
        score(12, 10),
        terms=8 + 2 * 12,
        size=float(jnp.abs(q).max() * jnp.abs(k).max()),
    )
    assert abs(score(5, 3) - score(5, 1)) > 1e-3


def published_frequency(
    pair: int, scaling: RotaryScaling | None, half: int = 2, base: float = 100.0
) -> float:
    """As Llama 3.1's code has it: by wave length, in three cases."""
    frequency = base ** (-pair / half)
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    wave, length = 2 * math.pi / frequency, scaling.original_length
    if wave < length / scaling.high_frequency_factor:
        return frequency
    if wave > length / scaling.low_frequency_factor:
        return frequency / scaling.factor
    smooth = (length / wave - scaling.low_frequency_factor) / (
        scaling.high_frequency_factor - scaling.low_frequency_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


@pytest.mark.parametrize("length", [5, 30, 100, 400])
@pytest.mark.parametrize("kind", ["linear", "llama3", None])
def test_scaled_frequencies_are_the_published_ones(kind: str | None, length: int) -> None:
    scaling = None if kind is None else RotaryScaling(kind=kind, original_length=length)  # type: ignore[arg-type]
    found = rotary_frequencies(8, 100.0, scaling)
    # A power, whose exponent is as near as its logarithm, up to 4.
    for pair, frequency in enumerate(found):
        assert_close(frequency, published_frequency(pair, scaling, half=8), terms=4 * 4 + 8)


def test_a_position_bias_makes_heads_prefer_distances_from_the_start() -> None:
    def make(bias_init: float) -> SelfAttention:
        config = dataclasses.replace(CONFIG, positions=PositionsConfig(bias_init=bias_init))
        return SelfAttention(config, out_scale=1.0, rngs=nnx.Rngs(0))

    assert not make(0.0).position_bias[...].any()
    far = make(8.0)
    scores = far.positions.score(far, jnp.zeros((1, 5, 2, 4))).scores
    assert scores is not None
    # Without any content, a key's score depends on its distance alone.
    assert_close(scores[0, :, 4, 3], scores[0, :, 3, 2], terms=8 + 4)
    assert np.ptp(scores[0, :, 4, :], axis=-1).min() > 1


def test_a_part_of_each_head_turns_as_a_head_of_that_width_would() -> None:
    x, places = jax.random.normal(jax.random.key(0), (2, 5, 3, 8)), jnp.tile(jnp.arange(5), (2, 1))
    turned = Rotary(4, 100.0, None).turn(x, places)
    expected = rotate(x[..., :4], places, rotary_frequencies(2, 100.0))
    np.testing.assert_array_equal(turned[..., :4], expected)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    odd = PositionsConfig("rotary", fraction=0.75)
    with pytest.raises(UserError, match="turn 3 of each head's 4 values"):
        make_positions(dataclasses.replace(CONFIG, positions=odd))


def test_alibi_slopes_are_the_published_ones() -> None:
    """The paper's section 3, and what its code gives 6 and 12 heads."""
    assert alibi_slopes(8) == tuple(2.0**-n for n in range(1, 9))
    np.testing.assert_allclose(alibi_slopes(16)[:2], (2**-0.5, 2**-1.0))
    assert sorted(alibi_slopes(6)) == sorted((*alibi_slopes(8)[1::2], *alibi_slopes(8)[:4:2]))
    assert len(alibi_slopes(12)) == len(set(alibi_slopes(12))) == 12
    assert alibi_slopes(1) == (2.0**-8,)


def test_learned_positions_are_added_and_end() -> None:
    learned = PositionsConfig("learned", max_length=4)
    model = filled(
        lambda rngs: LanguageModel(dataclasses.replace(CONFIG, positions=learned), rngs=rngs)
    )
    x = jnp.zeros((1, 5, 8))
    found = np.asarray(model.add_positions(x, jnp.array([[0, 3, 3, 1, 4]])))[0]
    table = np.asarray(model.position_embedding[...])
    np.testing.assert_array_equal(found[:4], table[[0, 3, 3, 1]])
    assert np.isnan(found[4]).all()
