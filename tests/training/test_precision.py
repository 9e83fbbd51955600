"""Gradients of trained parameters are summed in float32 over rows and devices, whatever is
computed in.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from flamingo_jax.experiment import (
    AttentionConfig,
    FeedForwardConfig,
    LanguageModelConfig,
    MeshConfig,
    ResamplerConfig,
    TrainingConfig,
    VisionConfig,
    ViTConfig,
)
from flamingo_jax.models import nfnet
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.models.layers import broadcast_param, gated_linear, linear
from flamingo_jax.models.resamplers import PerceiverResampler
from flamingo_jax.models.vit import ViT
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.planning import hlo
from flamingo_jax.planning.program import compile_program
from tests.models.filling import ONE_STAGE, filled
from tests.training import world

HALF = jnp.bfloat16
RNG = np.random.default_rng(0)


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def half_sums(
    text: str, among: Callable[[tuple[int, ...]], bool] = lambda group: True
) -> list[str]:
    """Sums over (groups of) devices of what was rounded to 16 bits: CPUs have none, and tell
    where they had to widen one.
    """
    found = []
    for instructions in hlo.parse(text)[0].values():
        for i in instructions:
            if i.opcode.removesuffix("-start") in ("all-reduce", "reduce-scatter") and among(
                hlo.first_group(i.rest)
            ):
                found += (
                    [f"{i.name}: {i.shape}"]
                    if "promoted" in i.rest or re.search(r"\b(bf16|f16)\[", i.shape)
                    else []
                )
    return found


def on_devices(slope: Callable[..., Any], parameters: Any, *rows: jax.Array) -> tuple[Any, str]:
    """The gradient with rows over eight devices, and the program."""
    mesh = make_mesh(MeshConfig(8, 1, 1))
    whole, shared = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    with jax.set_mesh(mesh):
        given = jax.device_put(parameters, whole), *(jax.device_put(r, shared) for r in rows)
        compiled = jax.jit(slope, out_shardings=whole).lower(*given).compile()
        return compiled(*given), compiled.as_text() or ""


X, DY, WEIGHT, GATE = draw(64, 3, 6), draw(64, 3, 2, 4), draw(6, 2, 4), jnp.float32(0.7)
WITH = {
    "a product": lambda p, x: linear(x, p["w"]),
    "a gated product": lambda p, x: gated_linear(x, p["w"], p["gate"]),
    "a bias": lambda p, x: (y := linear(x, p["w"])) + broadcast_param(p["bias"], y),
}


@pytest.mark.parametrize("kind", WITH)
def test_sums_over_rows_and_devices_are_not_rounded_to_sixteen_bits(kind: str) -> None:
    """Against float64 of the same sixteen bits."""
    parameters = {"w": WEIGHT, "gate": GATE, "bias": draw(2, 4)}

    def total(parameters: Any, x: jax.Array, dy: jax.Array) -> jax.Array:
        return jnp.sum(WITH[kind](parameters, x.astype(HALF)) * dy.astype(HALF), dtype=jnp.float32)

    found, text = on_devices(jax.grad(total), parameters, X, DY)
    assert not half_sums(text)
    x, dy = (np.asarray(a.astype(HALF), np.float64) for a in (X, DY))
    dw = np.einsum("blw,blhd->whd", x, dy)
    expected = {"w": dw, "bias": dy.sum((0, 1)), "gate": 0.0}
    if kind == "a gated product":
        expected |= {"w": float(GATE) * dw, "gate": np.vdot(dw, np.asarray(WEIGHT, np.float64))}
    for name in {"a bias": ("w", "bias"), "a gated product": ("w",)}.get(kind, ("w",)):
        scale = np.einsum("blw,blhd->whd", abs(x), abs(dy)).max()
        # 192 terms, each of their sums rounded to float32: far below 2^-9 of them.
        np.testing.assert_allclose(
            found[name], expected[name], atol=192 * 2**-24 * scale, err_msg=name
        )
    if kind == "a gated product":
        np.testing.assert_allclose(found["gate"], expected["gate"], rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "groups"),
    [((8, 8), 3, 1, 1), ((9, 7), 3, 2, 2), ((5, 5), 1, 2, 1)],
)
def test_a_convolutions_filters_have_the_gradient_of_whole_precision(
    size: tuple[int, int], kernel: int, stride: int, groups: int
) -> None:
    x, w = draw(2, *size, 4).astype(HALF), draw(kernel, kernel, 4 // groups, 6)
    y, slope = jax.vjp(lambda w: nfnet.convolution(x, w, stride, groups), w)
    dy = draw(*y.shape).astype(HALF)
    assert y.dtype == HALF
    _, exact = jax.vjp(lambda w: nfnet.convolution(x.astype(jnp.float32), w, stride, groups), w)
    (expected,) = exact(dy.astype(jnp.float32))
    (found,) = slope(dy)
    assert found.dtype == jnp.float32
    terms = dy.size // 6
    np.testing.assert_allclose(
        found, expected, atol=terms * 2**-24 * float(jnp.abs(expected).max())
    )


VIT = ViTConfig(
    patch_size=4,
    layers=2,
    width=8,
    heads=2,
    feed_forward=12,
    class_token=True,
    patch_bias=True,
    first_norm=True,
)
LANGUAGE_MODEL = LanguageModelConfig(
    vocab_size=9,
    layers=2,
    width=8,
    attention=AttentionConfig(heads=2, head_width=4),
    feed_forward=FeedForwardConfig(width=12),
)
RESAMPLER = ResamplerConfig(
    layers=2, width=8, heads=2, head_width=4, latents=2, frames=2, feed_forward=12
)
TOKENS = jnp.asarray(RNG.integers(0, 9, (8, 6)), jnp.int32)
MODULES: dict[
    str, tuple[Callable[[nnx.Rngs], Any], Callable[[Any, jax.Array], jax.Array], jax.Array]
] = {
    "vision transformer": (
        lambda rngs: ViT(VisionConfig(image_size=8, vit=VIT), rngs=rngs),
        lambda module, x: module(x.astype(HALF)),
        draw(8, 8, 8, 3),
    ),
    "NFNet's block": (
        lambda rngs: nfnet.Block(
            8, 8, 2, True, dataclasses.replace(ONE_STAGE, group_width=2), rngs=rngs
        ),
        lambda module, x: module(x.astype(HALF), 1.0),
        draw(8, 4, 4, 8),
    ),
    "resampler": (
        lambda rngs: PerceiverResampler(
            dataclasses.replace(RESAMPLER, position_grid=2), 5, rngs=rngs
        ),
        lambda module, x: module(x.astype(HALF), jnp.ones((8, 2), bool)),
        draw(8, 2, 4, 5),
    ),
    "language model": (
        lambda rngs: LanguageModel(
            dataclasses.replace(
                LANGUAGE_MODEL, attention=AttentionConfig(heads=2, head_width=4, bias=True)
            ),
            rngs=rngs,
            dtype=HALF,
        ),
        lambda module, x: module(
            x, jnp.broadcast_to(jnp.arange(6), (8, 6)), jnp.ones((8, 6), jnp.int32)
        ),
        TOKENS,
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_no_parameter_of_a_module_has_its_gradient_summed_in_sixteen_bits(name: str) -> None:
    make, run, x = MODULES[name]
    graph, state = nnx.split(filled(make))

    def total(state: Any, x: jax.Array) -> jax.Array:
        return jnp.square(run(nnx.merge(graph, state), x).astype(jnp.float32)).sum()

    _, text = on_devices(jax.grad(total), state, x)
    assert "all-reduce" in text
    assert not half_sums(text)


@pytest.mark.scale
def test_a_whole_steps_gradients_cross_the_mesh_in_float32() -> None:
    """On 2 x 2 x 2: activations may be summed over `model` (neighbouring devices) as they are,
    gradients over `data` and `fsdp` not.
    """
    training = TrainingConfig(steps=6, compute_dtype="bfloat16")
    program = compile_program(world.experiment(training=training), make_mesh(MeshConfig(2, 2, 2)))
    # Neighbours in pairs are those along `model`.
    assert not half_sums(program.hlo, lambda group: len(group) != 2 or group[1] != group[0] + 1)
