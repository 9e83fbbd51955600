"""Resamplers: any number of frames and cells, missing frames, interpolated time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.experiment import ResamplerConfig
from flamingo_jax.models.resamplers import PerceiverResampler, Resampler, make_resampler
from tests.rounding import assert_close

KINDS = ("perceiver", "transformer", "mlp")
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


def of_kind(kind: Any) -> Resampler:
    return make_resampler(dataclasses.replace(CONFIG, kind=kind), 12, 3, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("frames", "cells"), [(1, 9), (4, 9), (7, 4)])
def test_any_visual_becomes_the_same_number_of_tokens(kind: str, frames: int, cells: int) -> None:
    out = of_kind(kind)(jnp.ones((3, frames, cells, 12)), jnp.ones((3, frames), bool))
    assert out.shape == (3, 5, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_frames_do_not_matter(kind: str) -> None:
    resampler = of_kind(kind)
    features = jax.random.normal(jax.random.key(0), (1, 3, 4, 12))
    mask = jnp.array([[True, True, False]])
    other = features.at[:, 2].set(1e3)
    np.testing.assert_array_equal(resampler(features, mask), resampler(other, mask))
    assert_close(resampler(features, mask), resampler(features[:, :2], mask[:, :2]), TERMS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_visual_that_is_not_finite_is_nan_and_no_other(kind: str) -> None:
    features = jax.random.normal(jax.random.key(0), (3, 2, 4, 12))
    mask = jnp.array([[True, True], [True, False], [False, False]])
    broken = features.at[0, 1, 2, 3].set(jnp.inf).at[1, 1].set(jnp.nan)
    resampler = of_kind(kind)
    found, expected = resampler(broken, mask), resampler(features, mask)
    assert np.isnan(found[0]).all() and np.isfinite(expected).all()
    np.testing.assert_array_equal(found[1:], expected[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_frames_matters(kind: str) -> None:
    resampler = of_kind(kind)
    features, mask = jax.random.normal(jax.random.key(0), (1, 2, 4, 12)), jnp.ones((1, 2), bool)
    assert (
        float(jnp.abs(resampler(features[:, ::-1], mask) - resampler(features, mask)).max()) > 1e-4
    )


@pytest.mark.parametrize("kind", ["perceiver", "transformer"])
def test_order_of_cells_does_not_matter_to_attention(kind: str) -> None:
    resampler = of_kind(kind)
    features, mask = jax.random.normal(jax.random.key(0), (1, 2, 4, 12)), jnp.ones((1, 2), bool)
    # The transformer's features look at each other too: 13 keys of every one of them.
    assert_close(resampler(features[:, :, ::-1], mask), resampler(features, mask), 4 * TERMS)


def test_the_transformer_updates_what_its_latents_read() -> None:
    """Against its layers written out over the sequence of features and latents."""
    resampler: Any = of_kind("transformer")
    features = jax.random.normal(jax.random.key(0), (1, 2, 4, 12))
    embedded = features @ resampler.input_projection[...]
    embedded = (embedded + resampler.time_embeddings(2)[:, None]).reshape(8, 16)
    x = np.concatenate([embedded, resampler.latents[...]])
    graph, state = nnx.split(resampler.layers)
    for place in range(CONFIG.layers):
        layer: Any = nnx.merge(graph, jax.tree.map(lambda a, place=place: a[place], state))
        h = layer.attention_norm(x)
        query, key, value = (
            np.einsum("ld,dhe->hle", h, w[...]) for w in (layer.query, layer.key, layer.value)
        )
        weights = jax.nn.softmax(query @ key.swapaxes(1, 2) * CONFIG.head_width**-0.5, axis=-1)
        x = x + np.einsum("hle,hed->ld", weights @ value, layer.out[...])
        h = layer.feed_forward_norm(x)
        up, down = layer.feed_forward.up[...], layer.feed_forward.down[...]
        x = x + np.square(np.maximum(h @ up, 0)) @ down
    expected = resampler.final_norm(x[8:])
    found = resampler(features, jnp.ones((1, 2), bool))[0]
    assert_close(found, expected, 4 * TERMS, size=np.abs(expected).max())


def norm64(x: np.ndarray, norm: Any) -> np.ndarray:
    """A LayerNorm in float64."""
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])


def layer64(layer: Any, x: np.ndarray, queries: np.ndarray, keys: np.ndarray) -> tuple[Any, Any]:
    """A layer's output and its weights, the mean over heads, in float64."""
    query, key, value = (
        np.einsum("ld,dhe->hle", a, np.asarray(w[...], np.float64))
        for a, w in ((queries, layer.query), (keys, layer.key), (keys, layer.value))
    )
    scores = np.exp(query @ key.swapaxes(1, 2) * CONFIG.head_width**-0.5)
    weights = scores / scores.sum(-1, keepdims=True)
    x = x + np.einsum("hle,hed->ld", weights @ value, np.asarray(layer.out[...], np.float64))
    h = norm64(x, layer.feed_forward_norm)
    up, down = layer.feed_forward.up[...], layer.feed_forward.down[...]
    return x + np.square(np.maximum(h @ up, 0)) @ down, weights.mean(0)


@pytest.mark.parametrize("kind", ["perceiver", "transformer"])
def test_the_rollout_is_that_of_its_layers_in_float64(kind: str) -> None:
    """Against the product over layers of half the attention and half the identity, over the
    whole sequence of cells and latents, of which the latents are nobody's cells.
    """
    resampler: Any = of_kind(kind)
    features = jax.random.normal(jax.random.key(0), (2, 3, 4, 12))
    mask = jnp.array([[True, True, True], [True, True, False]])
    found = jax.jit(resampler.rollout)(features, mask)
    assert found.shape == (2, 5, 3, 4)
    np.testing.assert_allclose(found.sum((2, 3)), 1.0, rtol=1e-5)
    assert not found[1, :, 2].any()
    graph, state = nnx.split(resampler.layers)
    for visual, frames in enumerate((3, 2)):
        cells = 4 * frames
        x = np.asarray(features[visual, :frames], np.float64) @ resampler.input_projection[...]
        x = (x + np.asarray(resampler.time_embeddings(frames))[:, None]).reshape(cells, 16)
        latents = np.asarray(resampler.latents[...], np.float64)
        reach = np.zeros((cells + 5, cells))
        reach[:cells] = np.eye(cells)
        for place in range(CONFIG.layers):
            layer: Any = nnx.merge(graph, jax.tree.map(lambda a, place=place: a[place], state))
            attention = np.eye(cells + 5)
            if kind == "perceiver":
                queries = norm64(latents, layer.latent_norm)
                keys = np.concatenate([norm64(x, layer.feature_norm), queries])
                latents, weights = layer64(layer, latents, queries, keys)
                attention[cells:] = weights
            else:
                whole = np.concatenate([x, latents])
                h = norm64(whole, layer.attention_norm)
                whole, attention = layer64(layer, whole, h, h)
                x, latents = whole[:cells], whole[cells:]
            reach = (reach + attention @ reach) / 2
        expected = reach[cells:] / reach[cells:].sum(-1, keepdims=True)
        np.testing.assert_allclose(
            np.asarray(found[visual, :, :frames]).reshape(5, cells), expected, rtol=1e-4
        )


def test_the_mlps_rollout_is_its_maps_size_over_the_real_frames() -> None:
    resampler: Any = of_kind("mlp")
    found = resampler.rollout(jnp.ones((1, 3, 9, 12)), jnp.array([[True, False, True]]))
    sizes = np.abs(np.asarray(resampler.cells_to_tokens[...])).T
    expected = sizes / sizes.sum(1, keepdims=True) / 2
    np.testing.assert_allclose(found[0, :, 0], expected, rtol=1e-5)
    np.testing.assert_array_equal(found[0, :, 2], found[0, :, 0])
    assert not found[0, :, 1].any()


def test_the_mlps_map_is_stretched_over_another_grid() -> None:
    """Cells that are all alike say the same on any grid, and so does one twice as fine whose
    every four cells are one's.
    """
    resampler: Any = of_kind("mlp")
    mask = jnp.ones((1, 1), bool)
    alike = jnp.ones((1, 1, 9, 12)) * jnp.arange(12.0)
    fine = jnp.ones((1, 1, 36, 12)) * jnp.arange(12.0)
    size = float(jnp.abs(resampler(alike, mask)).max())
    # Rounding grows where the map's sum over cells is small beside its terms.
    assert_close(resampler(fine, mask), resampler(alike, mask), 100 * TERMS, size=size)
    table = np.asarray(resampler.cells_to_tokens[...])
    np.testing.assert_array_equal(resampler._map(9), table)
    assert resampler._map(36).shape == (36, 5)


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
