"""The layer's two halves, and the ways in which it adds them up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flamingo_jax.experiment import (
    AttentionConfig,
    FeedForwardConfig,
    LanguageModelConfig,
    NormConfig,
)
from flamingo_jax.models.decoder import DecoderLayer
from flamingo_jax.models.packing import Packing
from tests.models.filling import filled
from tests.rounding import assert_close

CONFIG = LanguageModelConfig(
    layers=1,
    width=8,
    attention=AttentionConfig(heads=2, head_width=4),
    feed_forward=FeedForwardConfig(width=12),
)
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 8)), jnp.float32)
PLACES = jnp.tile(jnp.arange(5), (2, 1))
WHOLE = Packing((jnp.ones((2, 5), jnp.int32),))
TERMS = 8 + 8 + 8 + 5 + 8 + 8 + 12


def layer_of(**changes: object) -> DecoderLayer:
    config = dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
    return filled(lambda rngs: DecoderLayer(config, rngs=rngs))


def run(layer: DecoderLayer, **options: object) -> jax.Array:
    return layer(X, PLACES, WHOLE, None, **options)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("residual", ["sequential", "parallel", "parallel_one_norm"])
@pytest.mark.parametrize("norm", [NormConfig(), NormConfig("layer", 1e-5, bias=False)])
def test_halves_are_added_as_the_config_says(residual: str, norm: NormConfig) -> None:
    layer = layer_of(residual=residual, norm=norm)
    attended = X + layer.attention(layer.attention_norm(X), PLACES, WHOLE, None)[0]
    feed_norm = layer.feed_forward_norm
    assert (feed_norm is None) is (residual == "parallel_one_norm")
    read = attended if residual == "sequential" else X
    expected = attended + layer.feed_forward((feed_norm or layer.attention_norm)(read))
    assert_close(run(layer), expected, TERMS)


def test_something_may_stand_between_the_halves() -> None:
    layer = layer_of()
    branch, _ = layer.attention_branch(X, PLACES, WHOLE, None)
    middle = 2 * layer.add(X, branch)
    expected = layer.add(middle, layer.feed_forward_branch(middle))
    assert_close(run(layer, between=lambda x: 2 * x), expected, TERMS)
    assert float(jnp.abs(run(layer) - expected).max()) > 1e-2
