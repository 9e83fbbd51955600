"""The language model: its head, what a token sees, packing and decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.experiment import (
    AttentionConfig,
    FeedForwardConfig,
    LanguageModelConfig,
    PositionsConfig,
)
from flamingo_jax.models.language_model import LanguageModel
from tests.models.filling import filled
from tests.rounding import assert_close

TERMS = 2 * (16 + 8 + 8 + 8 + 8 + 16 + 8 + 12) + 16 + 8
"""In each of two layers a norm, projections, scores of content and of position, 8 keys, the map
out, a norm and two products; the head.
"""
CONFIG = LanguageModelConfig(
    vocab_size=13,
    layers=2,
    width=8,
    attention=AttentionConfig(heads=2, head_width=4),
    feed_forward=FeedForwardConfig(width=12),
    embedding_scale=0.5,
)
LENGTH = 8
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, LENGTH)), jnp.int32)
POSITIONS = jnp.tile(jnp.arange(LENGTH), (2, 1))
ONES = jnp.ones((2, LENGTH), jnp.int32)


@pytest.fixture(scope="module", params=["transformer_xl", "rotary", "alibi", "learned"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return filled(
        lambda rngs: LanguageModel(
            dataclasses.replace(CONFIG, positions=PositionsConfig(kind=request.param)), rngs=rngs
        )
    )


@jax.jit
def forward(
    model: LanguageModel, tokens: jax.Array, positions: jax.Array, segments: jax.Array
) -> jax.Array:
    return model(tokens, positions, segments)


def test_a_token_sees_itself_and_what_came_before(model: LanguageModel) -> None:
    same = forward(model, TOKENS, POSITIONS, ONES)
    changed = forward(model, TOKENS.at[:, 4].set((TOKENS[:, 4] + 1) % 13), POSITIONS, ONES)
    assert (same.shape, same.dtype) == ((2, LENGTH, 13), jnp.float32)
    np.testing.assert_array_equal(changed[:, :4], same[:, :4])
    assert float(jnp.abs(changed[:, 4:] - same[:, 4:]).max(-1).min()) > 1e-4


def test_packing_equals_separate_rows(model: LanguageModel) -> None:
    """Texts of 3 and 4 tokens in one row with a token of padding, against each in a row of its
    own.
    """
    packed_positions, segments = (
        jnp.array([[0, 1, 2, 0, 1, 2, 3, 0]] * 2),
        jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]] * 2),
    )
    packed = forward(model, TOKENS, packed_positions, segments)
    shifted = jnp.zeros_like(TOKENS).at[:, :4].set(TOKENS[:, 3:7])
    first, second = (
        forward(model, TOKENS, POSITIONS, ONES),
        forward(model, shifted, POSITIONS, ONES),
    )
    assert_close(packed[:, :3], first[:, :3], TERMS)
    assert_close(packed[:, 3:7], second[:, :4], TERMS)


def test_decoding_equals_the_whole_row(model: LanguageModel) -> None:
    """Prompts of 5 and 3 tokens side by side, the shorter one padded, then token by token."""
    whole = forward(model, TOKENS, POSITIONS, ONES)
    decode = jax.jit(lambda model, tokens, positions, cache: model.decode(tokens, positions, cache))
    lengths, capacity = jnp.array([5, 3]), LENGTH + 2
    cache = model.init_cache(2, capacity)
    prompt = jnp.where(POSITIONS[:, :5] < lengths[:, None], POSITIONS[:, :5], capacity)
    logits, cache = decode(model, TOKENS[:, :5], prompt, cache)
    for row, length in enumerate((5, 3)):
        assert_close(logits[row, :length], whole[row, :length], TERMS)
    rows = jnp.arange(2)
    for step in range(3):
        places = lengths + step
        logits, cache = decode(model, TOKENS[rows, places][:, None], places[:, None], cache)
        assert_close(logits[:, 0], whole[rows, places], TERMS)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head(tied: bool) -> None:
    """The norm of the last hidden state times the embedding, or times a matrix of its own."""
    model = filled(
        lambda rngs: LanguageModel(dataclasses.replace(CONFIG, tied_embeddings=tied), rngs=rngs)
    )
    x = np.random.default_rng(1).standard_normal((1, 3, 8))
    normed = (
        x
        / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        * np.asarray(model.final_norm.scale[...], np.float64)
    )
    head = model.embedding[...].T if tied else model.head[...]
    assert_close(
        model.logits(jnp.asarray(x, jnp.float32)),
        normed @ np.asarray(head, np.float64),
        terms=16 + 8,
    )
    assert (model.head is None) is tied
    np.testing.assert_allclose(model.embed(TOKENS), 0.5 * np.asarray(model.embedding[...])[TOKENS])


def test_half_precision_gives_float32_logits() -> None:
    model = filled(lambda rngs: LanguageModel(CONFIG, rngs=rngs, dtype=jnp.bfloat16))
    assert model.embed(TOKENS).dtype == model.init_cache(1, 4).key.dtype == jnp.bfloat16
    assert jax.eval_shape(model, TOKENS, POSITIONS, ONES).dtype == jnp.float32


def test_the_size_of_the_program_does_not_grow_with_depth() -> None:
    def lines(layers: int) -> int:
        model = nnx.eval_shape(
            lambda: LanguageModel(dataclasses.replace(CONFIG, layers=layers), rngs=nnx.Rngs(0))
        )
        graph, state = nnx.split(model)
        return len(
            jax.jit(lambda s: nnx.merge(graph, s)(TOKENS, POSITIONS, ONES))
            .lower(state)
            .as_text()
            .splitlines()
        )

    assert lines(12) == lines(3)
