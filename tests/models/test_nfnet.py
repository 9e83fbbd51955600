"""NFNet against a float64 numpy version of the published block, and the variance it promises."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import VisionConfig
from flamingo_jax.models import nfnet
from flamingo_jax.models.nfnet import NFNet, Variant
from flamingo_jax.pytrees import from_flat, to_flat
from tests.models.filling import filled
from tests.rounding import assert_close

TINY = VisionConfig(variant="tiny", image_size=48)
SMALL = Variant((4, 8), (2, 1), (16, 32), (3, 2), (1, 2), 4, 24)
"""Every part of the family: groups of 4 channels, stacks of two blocks and of one, a shortcut
with and without a pool.
"""
TERMS = 2 * (27 + 36) + 5 * 2 * (32 + 36 + 36 + 16 + 32 + 16) + 2 * 32
"""Of the stem, of five blocks' four convolutions and squeeze-and-excite, and of the last map;
each as many once more where its weights are standardised.
"""
MILLIONS = {
    "F0": 68.42,
    "F1": 129.56,
    "F2": 190.71,
    "F3": 251.85,
    "F4": 313.00,
    "F5": 374.14,
    "F6": 435.29,
}
"""Without classifier."""

Weights = dict[Any, Any]


@pytest.fixture(scope="module")
def small() -> NFNet:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(nfnet.VARIANTS, "small", SMALL)
        return filled(
            lambda rngs: NFNet(VisionConfig(variant="small", stochastic_depth=0.5), rngs=rngs)
        )


def run(model: NFNet, images: Any, **options: Any) -> jax.Array:
    graph, state = nnx.split(model)
    return jax.jit(lambda state, images: nnx.merge(graph, state)(images, **options))(
        state, jnp.asarray(images, jnp.float32)
    )


def gelu(x: np.ndarray) -> np.ndarray:
    return (
        1.7015043497085571 * 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    )


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def same_padding(
    x: np.ndarray, size: int, stride: int, value: float
) -> tuple[np.ndarray, int, int]:
    """Padded as TensorFlow's SAME, the odd one behind; and the output's sides."""
    pads, outs = [(0, 0)], []
    for side in x.shape[1:3]:
        out = -(-side // stride)
        total = max((out - 1) * stride + size - side, 0)
        pads.append((total // 2, total - total // 2))
        outs.append(out)
    return np.pad(x, [*pads, (0, 0)], constant_values=value), outs[0], outs[1]


def conv(x: np.ndarray, parameters: Weights, stride: int = 1) -> np.ndarray:
    """Each output pixel a sum over its window and its group's channels, with each filter's own
    standardisation.
    """
    weight, gain, bias = parameters["weight"], parameters["gain"], parameters["bias"]
    size, _, inputs, outputs = weight.shape
    groups = x.shape[-1] // inputs
    padded, high, wide = same_padding(x, size, stride, 0.0)
    out = np.zeros((len(x), high, wide, outputs))
    for o in range(outputs):
        kernel = weight[..., o]
        kernel = (
            (kernel - kernel.mean()) * gain[o] / math.sqrt(max(kernel.var() * kernel.size, 1e-4))
        )
        start = (o // (outputs // groups)) * inputs
        for i in range(high):
            for j in range(wide):
                window = padded[
                    :,
                    i * stride : i * stride + size,
                    j * stride : j * stride + size,
                    start : start + inputs,
                ]
                out[:, i, j, o] = (window * kernel).sum((1, 2, 3)) + bias[o]
    return out


def pool(x: np.ndarray) -> np.ndarray:
    padded, high, wide = same_padding(x, 2, 2, np.nan)
    return np.nanmean(padded.reshape(len(x), high, 2, wide, 2, -1), axis=(2, 4))


def block(x: np.ndarray, parameters: Weights, deviation: float, stride: int) -> np.ndarray:
    out = gelu(x) / deviation
    skip = x
    if "shortcut" in parameters:
        skip = conv(pool(out) if stride > 1 else out, parameters["shortcut"])
    h = gelu(conv(out, parameters["reduce"]))
    h = gelu(conv(h, parameters["first"], stride))
    h = conv(gelu(conv(h, parameters["second"])), parameters["expand"])
    gate = parameters["squeeze_excite"]
    squeezed = np.maximum(h.mean((1, 2)) @ gate["down"] + gate["down_bias"], 0)
    h = 2 * h * sigmoid(squeezed @ gate["up"] + gate["up_bias"])[:, None, None]
    return skip + 0.2 * parameters["skip_gain"] * h


def network(x: np.ndarray, parameters: Weights) -> np.ndarray:
    for place, stride in enumerate(SMALL.stem_strides):
        x = conv(gelu(x) if place else x, parameters["stem"][place], stride)
    deviation = 1.0
    for place, stride in enumerate(SMALL.strides):
        stage = parameters["stages"][place]
        x = block(x, stage["transition"], deviation, stride)
        deviation = math.sqrt(1 + 0.2**2)
        for layer in range(SMALL.depths[place] - 1):
            x = block(
                x, jax.tree.map(lambda a, layer=layer: a[layer], stage["layers"]), deviation, 1
            )
            deviation = math.sqrt(deviation**2 + 0.2**2)
    return gelu(conv(x, parameters["final"]))


@pytest.mark.parametrize("side", [8, 10])
def test_equals_the_published_form(small: NFNet, side: int) -> None:
    """Side 10 ends in an odd grid, 5 to 3, where the pool's last window is cut."""
    images = np.random.default_rng(1).standard_normal((2, side, side, 3))
    parameters = from_flat(
        {name: np.asarray(a, np.float64) for name, a in to_flat(nnx.state(small)).items()}
    )
    expected = network(images, parameters)
    out = run(small, images)
    assert out.shape == (2, -(-side // 4), -(-side // 4), 24)
    assert_close(out, expected, TERMS)


@pytest.mark.parametrize("variant", MILLIONS)
def test_published_sizes(variant: str) -> None:
    model = nnx.eval_shape(lambda: NFNet(VisionConfig(variant=variant), rngs=nnx.Rngs(0)))
    count = sum(math.prod(a.shape) for a in to_flat(nnx.state(model)).values())
    assert round(count / 1e6, 2) == MILLIONS[variant]
    assert model.width == 3072


@pytest.mark.parametrize(("size", "cells"), [(288, 9), (320, 10), (480, 15)])
def test_grid_of_the_paper(size: int, cells: int) -> None:
    shape = jax.eval_shape(
        lambda: NFNet(VisionConfig(), rngs=nnx.Rngs(0))(jnp.zeros((2, size, size, 3), jnp.bfloat16))
    )
    assert (shape.shape, shape.dtype) == ((2, cells, cells, 3072), jnp.bfloat16)


def test_the_tiny_one() -> None:
    model = nnx.eval_shape(lambda: NFNet(TINY, rngs=nnx.Rngs(0)))
    assert sum(math.prod(a.shape) for a in to_flat(nnx.state(model)).values()) < 5e5
    features = jax.eval_shape(lambda: NFNet(TINY, rngs=nnx.Rngs(0))(jnp.zeros((1, 48, 48, 3))))
    assert features.shape == (1, 6, 6, model.width) == (1, 6, 6, 160)


def test_variance_grows_as_the_betas_say() -> None:
    """Branches start shut: equal blocks change nothing.

    Opened with skip gains of 1, each adds alpha^2 to a variance that starts at 1.
    """
    depth = 25

    @jax.jit
    def run_stage() -> tuple[jax.Array, jax.Array, jax.Array]:
        stage = nfnet.Stage(32, 64, depth, 1, SMALL, rngs=nnx.Rngs(0))
        x = jax.random.normal(jax.random.key(0), (4, 16, 16, 32))
        shut, first = stage(x, 1.0, None), stage.transition(x, 1.0)
        stage.transition.skip_gain[...] = jnp.ones(())
        stage.layers.skip_gain[...] = jnp.ones((depth - 1,))
        return shut, first, stage(x, 1.0, None)

    shut, first, opened = run_stage()
    np.testing.assert_array_equal(shut, first)
    np.testing.assert_allclose(
        [shut.std(), opened.std()], [1, math.sqrt(1 + 0.2**2 * depth)], rtol=0.1
    )


def test_stochastic_depth(small: NFNet) -> None:
    """By key, by sample, in training alone, never the first block, and dropped blocks pass
    their input on.
    """
    images = jax.random.normal(jax.random.key(0), (6, 8, 8, 3))
    plain = run(small, images)
    np.testing.assert_array_equal(run(small, images, train=True), plain)
    np.testing.assert_array_equal(run(small, images, key=jax.random.key(1)), plain)
    drawn = run(small, images, train=True, key=jax.random.key(1))
    np.testing.assert_array_equal(run(small, images, train=True, key=jax.random.key(1)), drawn)
    assert (
        float(jnp.abs(run(small, images, train=True, key=jax.random.key(2)) - drawn).max()) > 1e-3
    )

    stage, x = small.stages[0], jax.random.normal(jax.random.key(0), (3, 4, 4, 8))
    keep = jnp.array([[True, True, True], [False, False, True], [False, False, True]])
    out, whole, first = stage(x, 1.0, keep), stage(x, 1.0, None), stage.transition(x, 1.0)
    assert_close(out, jnp.concatenate([first[:2], whole[2:]]), TERMS)


def test_at_rate_0_no_key_changes_anything(small: NFNet) -> None:
    graph, state = nnx.split(small)
    still = nnx.merge(graph, state)
    still.stochastic_depth = 0.0
    images = jax.random.normal(jax.random.key(0), (6, 8, 8, 3))
    np.testing.assert_array_equal(
        run(still, images, train=True, key=jax.random.key(1)), run(small, images)
    )


def test_how_often_blocks_are_dropped(small: NFNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block i of 5 at rate 0.5 x i / 5."""
    seen = []
    monkeypatch.setattr(
        nfnet.Stage,
        "__call__",
        lambda self, x, beta, keep: seen.append(keep) or jnp.zeros((len(x), 1, 1, 32)),
    )
    small(jnp.zeros((4000, 2, 2, 3)), train=True, key=jax.random.key(0))
    dropped = 1 - np.concatenate([np.asarray(keep).mean(1) for keep in seen])
    np.testing.assert_allclose(dropped, 0.1 * np.arange(5), atol=0.03)


def test_prepared_it_is_the_same_function(small: NFNet) -> None:
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
    prepared = small.prepared(jnp.dtype(jnp.float32))
    assert_close(prepared(images), small(images), TERMS)
    again = prepared.prepared(jnp.dtype(jnp.float32))
    np.testing.assert_array_equal(again(images), prepared(images))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"'F9'.*F0, F1.*tiny"):
        NFNet(dataclasses.replace(TINY, variant="F9"), rngs=nnx.Rngs(0))
