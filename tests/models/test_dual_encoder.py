"""The dual encoder: pooling, unit length, pixels and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.experiment import ContrastiveConfig, TextEncoderConfig, VisionConfig
from flamingo_jax.models import nfnet
from flamingo_jax.models.dual_encoder import DualEncoder
from flamingo_jax.processing.normalise import normalise
from tests.models.filling import ONE_STAGE, filled_dual_encoder
from tests.rounding import assert_close

ENCODER = 200
"""Terms within either encoder, of which the longest sums are convolutions over 3 x 3 x 4 values
and norms over 8.
"""
CONFIG = ContrastiveConfig(
    vision=VisionConfig(
        variant="one_stage", image_size=16, mean=(0.2, 0.4, 0.6), std=(0.5, 0.25, 0.125)
    ),
    text=TextEncoderConfig(vocab_size=11, layers=1, width=8, heads=2, max_length=6),
    joint_width=12,
    initial_temperature=0.1,
)


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return filled_dual_encoder(CONFIG)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_normalise() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3)).astype(np.uint8)
    out = normalise(jnp.asarray(images), CONFIG.vision.mean, CONFIG.vision.std, jnp.float32)
    assert_close(out, (images / 255 - CONFIG.vision.mean) / CONFIG.vision.std, terms=4)
    assert (
        normalise(jnp.asarray(images), CONFIG.vision.mean, CONFIG.vision.std, jnp.bfloat16).dtype
        == jnp.bfloat16
    )


def test_images(model: DualEncoder) -> None:
    """The mean over the grid, projected, of length 1."""
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    pixels = (images / 255 - CONFIG.vision.mean) / CONFIG.vision.std
    grid = np.asarray(model.vision(jnp.asarray(pixels, jnp.float32)), np.float64)
    expected = unit(grid.mean((1, 2)) @ np.asarray(model.vision_projection[...], np.float64))
    # Behind the encoder: the mean over the grid, the projection, the length; the encoder is the
    # same.
    assert_close(model.encode_images(jnp.asarray(images)), expected, terms=ENCODER + 4 + 16 + 12)


def test_texts(model: DualEncoder) -> None:
    """The mean over real tokens, projected, of length 1; what padding holds does not matter."""
    tokens = jnp.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]])
    mask = jnp.array([[True] * 6, [True] * 3 + [False] * 3])
    out = model.encode_texts(tokens, mask)
    np.testing.assert_array_equal(model.encode_texts(tokens.at[1, 3:].set(10), mask), out)
    words = np.asarray(model.text(tokens[1:, :3], mask[1:, :3]), np.float64)
    expected = unit(words[0].mean(0) @ np.asarray(model.text_projection[...], np.float64))
    assert_close(out[1], expected, terms=ENCODER + 3 + 8 + 12)
    assert_close(jnp.linalg.norm(out, axis=-1), 1, terms=2 * 12)


def test_an_empty_text_has_no_direction_and_a_finite_gradient(model: DualEncoder) -> None:
    tokens, mask = jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4), bool)
    np.testing.assert_array_equal(model.encode_texts(tokens, mask), jnp.zeros((1, 12)))
    graph, state = nnx.split(model)
    grads = jax.jit(jax.grad(lambda s: nnx.merge(graph, s).encode_texts(tokens, mask).sum()))(state)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_temperature_starts_as_configured() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(nfnet.VARIANTS, "one_stage", ONE_STAGE)
        start = jax.jit(
            lambda: DualEncoder(CONFIG, rngs=nnx.Rngs(0)).log_inverse_temperature[...]
        )()
    # The logarithm is off by half a unit of its last place, which its exponential multiplies.
    assert_close(jnp.exp(start), 10, terms=4)


def test_half_precision_gives_float32_vectors_of_length_1() -> None:
    half = filled_dual_encoder(CONFIG, jnp.bfloat16)
    images, tokens, mask = (
        jnp.zeros((1, 16, 16, 3), jnp.uint8),
        jnp.ones((1, 4), jnp.int32),
        jnp.ones((1, 4), bool),
    )
    for out in (half.encode_images(images), half.encode_texts(tokens, mask)):
        assert out.dtype == jnp.float32
        assert_close(jnp.linalg.norm(out, axis=-1), 1, terms=2 * 12)
