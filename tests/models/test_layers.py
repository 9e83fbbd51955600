"""The shared small parts against float64 numpy, and stacked layers against a loop over them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from flamingo_jax.experiment import MeshConfig
from flamingo_jax.models import ops
from flamingo_jax.models.layers import (
    ACTIVATIONS,
    FeedForward,
    LayerNorm,
    RMSNorm,
    fan_in_normal,
    gated_linear,
    linear,
    scan_layers,
    stack,
)
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.pytrees import to_flat
from tests.models.filling import filled
from tests.rounding import assert_close

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 8)) * 3 + 1
NORM = 2 * 8 + 4
"""Terms of a norm over 8 values: the mean, the variance, and what is done with them."""
TERMS_OF_A_LAYER = 4 + 1 + 4
"""Of `Affine`: a product of 4 terms, its bias, and the sum over what it gives."""


@pytest.mark.parametrize(
    ("shape", "weight", "contract", "equation"),
    [
        ((2, 3, 8), (8, 5), 1, "abi,io->abo"),
        ((2, 3, 8), (8, 2, 5), 1, "abi,iho->abho"),
        ((2, 3, 4, 2), (4, 2, 5), 2, "abhd,hdo->abo"),
        ((4, 2), (4, 2, 5, 3), 2, "hd,hdop->op"),
        ((8,), (8, 5), 1, "i,io->o"),
    ],
)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_linear(
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    contract: int,
    equation: str,
    platform: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ops, "platform", lambda: platform)
    x, w = RNG.standard_normal(shape), RNG.standard_normal(weight)
    out = linear(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), contract)
    assert_close(out, np.einsum(equation, x, w), terms=8)


@pytest.mark.parametrize("gate", [0.0, -0.6])
def test_a_gates_gradient_is_that_of_the_gated_product(gate: float) -> None:
    x, w = (
        jnp.asarray(RNG.standard_normal((3, 4, 2)), jnp.float32),
        jnp.asarray(RNG.standard_normal((4, 2, 5)), jnp.float32),
    )

    def total(x: Any, w: Any, gate: Any) -> jax.Array:
        return jnp.sin(gated_linear(x, w, jnp.tanh(gate), 2)).sum()

    def plain(x: Any, w: Any, gate: Any) -> jax.Array:
        return jnp.sin(jnp.tanh(gate) * linear(x, w, 2)).sum()

    given = (x, w, jnp.float32(gate))
    np.testing.assert_array_equal(total(*given), plain(*given))
    for found, expected in zip(
        jax.grad(total, (0, 1, 2))(*given), jax.grad(plain, (0, 1, 2))(*given), strict=True
    ):
        # Two products of up to 8 terms, and the sum over 15 sines.
        assert_close(found, expected, terms=2 * (8 + 8) + 15)


def test_a_weight_is_cast_to_its_activation() -> None:
    assert (
        linear(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.float32)).dtype == jnp.bfloat16
    )


def test_layer_norm() -> None:
    module = filled(lambda _: LayerNorm(8, 1e-2))
    scale, bias = (np.asarray(a[...], np.float64) for a in (module.scale, module.bias))
    expected = (X - X.mean(-1, keepdims=True)) / np.sqrt(
        X.var(-1, keepdims=True) + 1e-2
    ) * scale + bias
    assert_close(module(jnp.asarray(X, jnp.float32)), expected, terms=NORM)


def test_rms_norm() -> None:
    module = filled(lambda _: RMSNorm(8, 1e-2))
    expected = (
        X
        / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-2)
        * np.asarray(module.scale[...], np.float64)
    )
    assert_close(module(jnp.asarray(X, jnp.float32)), expected, terms=NORM)


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_norms_take_their_statistics_in_float32(norm: Any) -> None:
    """1,000 values of 1.0 and one of 64 in bfloat16, whose own sums stop growing at 256."""
    x = np.ones((1, 1001))
    x[0, 0] = 64
    out = norm(1001)(jnp.asarray(x, jnp.bfloat16))
    centred = x - x.mean() if norm is LayerNorm else x
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(out, np.float64), centred / np.sqrt((centred**2).mean()), rtol=1e-2
    )


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_norms_of_rows_that_lie_over_the_mesh_gather_nothing(norm: Any) -> None:
    mesh = make_mesh(MeshConfig(data=2, model=4))
    x = jax.ShapeDtypeStruct(
        (4, 8, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data", "model"))
    )
    graph, parameters = nnx.split(norm(16))
    gradient = jax.jit(
        jax.grad(lambda parameters, x: jnp.square(nnx.merge(graph, parameters)(x)).sum())
    )
    text = gradient.lower(parameters, x).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text


@pytest.mark.parametrize("bias", [False, True])
def test_feed_forward(bias: bool) -> None:
    module = filled(lambda rngs: FeedForward(8, 6, "squared_relu", bias=bias, rngs=rngs))
    w = {name: np.asarray(a, np.float64) for name, a in to_flat(nnx.state(module)).items()}
    hidden = np.maximum(X @ w["up"] + w.get("up_bias", 0), 0) ** 2
    expected = hidden @ w["down"] + w.get("down_bias", 0)
    # A squared sum counts twice.
    assert_close(module(jnp.asarray(X, jnp.float32)), expected, terms=2 * 9 + 7)
    assert len(w) == (4 if bias else 2)


def test_initial_deviation() -> None:
    w = np.asarray(fan_in_normal(nnx.Rngs(0), (50, 20, 100), 1000, scale=0.5)[...])
    assert w.std() == pytest.approx(0.5 / math.sqrt(1000), rel=0.02)
    assert np.abs(w).max() <= 2 / 0.8796 * 0.5 / math.sqrt(1000)


class Affine(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.w, self.b = fan_in_normal(rngs, (4, 4)), nnx.Param(jnp.zeros((4,)))


def body(layer: Affine, x: jax.Array, given: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Order matters, and so does which input a layer is given."""
    x = jnp.tanh(linear(x, layer.w[...]) + layer.b[...])
    if given is not None:
        x = x * given[:, None]
    return x, x.sum()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("with_inputs", [False, True])
def test_stacked_layers_equal_a_loop_over_them(count: int, with_inputs: bool) -> None:
    stacked = stack(lambda rngs: Affine(rngs), count, nnx.Rngs(0))
    graph, state = nnx.split(stacked)
    assert {name: a.shape for name, a in to_flat(state).items()} == {
        "w": (count, 4, 4),
        "b": (count, 4),
    }
    x, inputs = (
        jax.random.normal(jax.random.key(1), (2, 4)),
        (jnp.arange(1.0, 2 * count + 1).reshape(count, 2) if with_inputs else None),
    )

    def scanned(state: nnx.State) -> tuple[jax.Array, jax.Array]:
        return scan_layers(nnx.merge(graph, state), body, x, inputs)

    def looped(state: nnx.State) -> tuple[jax.Array, jax.Array]:
        carry, outputs = x, []
        for place in range(count):
            layer = nnx.merge(graph, jax.tree.map(lambda a, place=place: a[place], state))
            carry, output = body(layer, carry, None if inputs is None else inputs[place])
            outputs.append(output)
        return carry, jnp.stack(outputs)

    for a, b in zip(jax.tree.leaves(scanned(state)), jax.tree.leaves(looped(state)), strict=True):
        assert a.shape == b.shape
        assert_close(a, b, terms=count * TERMS_OF_A_LAYER)
    slopes = [
        jax.grad(lambda s, f=f: f(s)[0].sum() + f(s)[1].sum())(state) for f in (scanned, looped)
    ]
    for a, b in zip(*map(jax.tree.leaves, slopes), strict=True):
        assert_close(a, b, terms=2 * count * TERMS_OF_A_LAYER)


def test_layers_of_a_stack_are_drawn_each_for_itself() -> None:
    w = np.asarray(stack(lambda rngs: Affine(rngs), 3, nnx.Rngs(0)).w[...])
    assert all(np.abs(w[i] - w[j]).max() > 0.1 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_gated_feed_forward_is_the_product_of_gate_and_up() -> None:
    """SwiGLU (Shazeer 2020), as Llama has it."""
    module = filled(lambda rngs: FeedForward(3, 5, "silu", gated=True, rngs=rngs))
    x = np.random.default_rng(0).standard_normal((2, 3))
    gate, up, down = (np.asarray(w[...], np.float64) for w in (module.gate, module.up, module.down))
    expected = (x @ gate / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down
    assert_close(module(jnp.asarray(x, jnp.float32)), expected, terms=2 * 3 + 5)


@pytest.mark.parametrize(
    ("name", "at_one"),
    [("gelu", 0.8411920), ("exact_gelu", 0.8413447), ("quick_gelu", 0.8457958)],
)
def test_the_three_gelus(name: str, at_one: float) -> None:
    assert float(ACTIVATIONS[name](jnp.float32(1.0))) == pytest.approx(at_one, abs=1e-6)
