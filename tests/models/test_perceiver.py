"""The resampler: any number of frames and cells, missing frames, interpolated time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.experiment import ResamplerConfig
from flamingo_jax.models.perceiver import PerceiverResampler
from tests.rounding import assert_close

TERMS = 12 + 2 * (2 * 16 + 8 + 13 + 16 + 16 + 32) + 32
"""Of the map from features, in each of two layers two norms, scores, 13 keys, the map out and
both feed-forward products, and the last norm.
"""
CONFIG = ResamplerConfig(
    layers=2, width=16, heads=2, head_width=8, latents=5, frames=4, feed_forward=32
)


@pytest.fixture(scope="module")
def resampler() -> PerceiverResampler:
    return PerceiverResampler(CONFIG, 12, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("frames", "cells"), [(1, 9), (4, 9), (7, 4)])
def test_any_visual_becomes_the_same_number_of_tokens(
    resampler: PerceiverResampler, frames: int, cells: int
) -> None:
    out = resampler(jnp.ones((3, frames, cells, 12)), jnp.ones((3, frames), bool))
    assert out.shape == (3, 5, 16)


def test_masked_frames_do_not_matter(resampler: PerceiverResampler) -> None:
    features = jax.random.normal(jax.random.key(0), (1, 3, 4, 12))
    mask = jnp.array([[True, True, False]])
    other = features.at[:, 2].set(1e3)
    np.testing.assert_array_equal(resampler(features, mask), resampler(other, mask))
    assert_close(resampler(features, mask), resampler(features[:, :2], mask[:, :2]), TERMS)


def test_order_of_frames_matters_and_order_of_cells_does_not(
    resampler: PerceiverResampler,
) -> None:
    features, mask = jax.random.normal(jax.random.key(0), (1, 2, 4, 12)), jnp.ones((1, 2), bool)
    assert_close(resampler(features[:, :, ::-1], mask), resampler(features, mask), TERMS)
    assert (
        float(jnp.abs(resampler(features[:, ::-1], mask) - resampler(features, mask)).max()) > 1e-4
    )


def test_time_embeddings_are_interpolated_linearly(resampler: PerceiverResampler) -> None:
    table = np.asarray(resampler.time_embedding[...])
    np.testing.assert_array_equal(resampler.time_embeddings(2), table[:2])
    stretched = np.asarray(resampler.time_embeddings(30))
    expected = np.stack(
        [np.interp(np.linspace(0, 3, 30), np.arange(4), table[:, i]) for i in range(16)], axis=1
    )
    # A weight of two terms is as near as its place, up to 3.
    assert_close(stretched, expected, terms=3 * 2)


def test_a_single_trained_frame_stretches_to_many() -> None:
    resampler = PerceiverResampler(
        ResamplerConfig(
            layers=1, width=8, heads=1, head_width=8, latents=2, frames=1, feed_forward=8
        ),
        4,
        rngs=nnx.Rngs(0),
    )
    assert_close(
        resampler.time_embeddings(3), np.repeat(resampler.time_embedding[...], 3, 0), terms=2
    )


def test_a_cells_place_is_its_row_and_its_column() -> None:
    config = ResamplerConfig(
        layers=1,
        width=8,
        heads=1,
        head_width=8,
        latents=2,
        frames=1,
        feed_forward=8,
        position_grid=3,
    )
    resampler = PerceiverResampler(config, 4, rngs=nnx.Rngs(0))
    rows, columns = np.asarray(resampler.position_embedding[...])
    assert_close(resampler.position_embeddings(9)[3 * 2 + 1], rows[2] + columns[1], terms=6)
    # A finer grid has the same corners' order: a row's cells differ by their columns alone.
    finer = np.asarray(resampler.position_embeddings(36)).reshape(6, 6, 8)
    spread = np.broadcast_to(finer[0, 0] - finer[5, 0], (6, 8))
    assert_close(finer[0] - finer[5], spread, terms=6, size=np.abs(finer).max())
    features, mask = jax.random.normal(jax.random.key(0), (1, 1, 9, 4)), jnp.ones((1, 1), bool)
    assert (
        np.abs(np.asarray(resampler(features, mask) - resampler(features[:, :, ::-1], mask))).max()
        > 0.1
    )
