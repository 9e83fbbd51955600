"""Weights of several arrays: what they multiply to, what trains, where they lie."""

from typing import Any

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
    MeshConfig,
)
from flamingo_jax.models.decoder import DecoderLayer
from flamingo_jax.models.int8 import Int8Weight
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.models.language_model_config import LoRAConfig
from flamingo_jax.models.layers import linear
from flamingo_jax.models.packing import Packing
from flamingo_jax.models.weights import INPUT_AXES, LoRAWeight, dense, make_dense
from flamingo_jax.partitioning import rules
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.pytrees import to_flat
from tests.models.filling import filled
from tests.rounding import assert_close

RNG = np.random.default_rng(0)
CONFIG = LanguageModelConfig(
    vocab_size=16,
    layers=2,
    width=8,
    attention=AttentionConfig(heads=2, head_width=4),
    feed_forward=FeedForwardConfig(width=12),
)
EVERYTHING = LoRAConfig(rank=2, alpha=6.0, targets=("attention/.*", "feed_forward/.*"))
SHAPES = {"to heads": ((8, 2, 4), 1), "out of heads": ((2, 4, 8), 2)}


def drawn(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_the_product_with_what_it_stands_for(shape: str) -> None:
    sizes, inputs = SHAPES[shape]
    w, x = drawn(*sizes), drawn(3, *sizes[:inputs])
    weight = Int8Weight(w, inputs)
    whole = np.asarray(weight.dense(), np.float64)
    axes = tuple(range(inputs))
    assert (np.abs(weight.int8[...]).max(axes) == 127).all() and weight.int8.dtype == jnp.int8
    assert (np.abs(whole - w) <= 0.5001 * np.asarray(weight.int8_scale[...])).all()
    expected = np.tensordot(np.asarray(x, np.float64), whole, inputs)
    assert_close(linear(x, weight, inputs), expected, terms=8 + 2)
    wanted = RNG.standard_normal(expected.shape)
    gradient = jax.grad(lambda x: (linear(x, weight, inputs) * wanted).sum())(x)
    outputs = whole.ndim - inputs
    rows = np.moveaxis(whole, range(inputs), range(-inputs, 0))
    assert_close(gradient, np.tensordot(wanted, rows, outputs), terms=8 + 2)
    half = linear(x.astype(jnp.bfloat16), weight, inputs)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(half, np.float64), expected, atol=2e-2 * np.abs(expected).max()
    )


def test_int8_of_a_channel_of_zeros_is_zeros() -> None:
    weight = Int8Weight(drawn(4, 3).at[:, 1].set(0.0), 1)
    assert not np.asarray(weight.dense())[:, 1].any() and np.isfinite(weight.int8_scale[...]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stack_is_its_layers(shape: str) -> None:
    sizes, inputs = SHAPES[shape]
    stack = drawn(3, *sizes)
    found = Int8Weight(stack, inputs, stacked=1).dense()
    for layer, w in enumerate(stack):
        np.testing.assert_array_equal(found[layer], Int8Weight(w, inputs).dense())
    updated = LoRAWeight(nnx.Param(stack), inputs, EVERYTHING, stacked=1, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(updated.dense(), stack)
    updated.lora_up[...] = drawn(*updated.lora_up.shape)
    graph, state = nnx.split(updated)
    for layer in range(3):
        one = nnx.merge(graph, jax.tree.map(lambda a, n=layer: a[n], state))
        assert_close(updated.dense()[layer], one.dense(), terms=4)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_low_rank_update_is_added_to_its_base(shape: str, quantised: bool) -> None:
    sizes, inputs = SHAPES[shape]
    w, x = drawn(*sizes), drawn(3, *sizes[:inputs])
    base = Int8Weight(w, inputs) if quantised else nnx.Param(w)
    weight = LoRAWeight(base, inputs, EVERYTHING, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(linear(x, weight, inputs), linear(x, base, inputs))
    weight.lora_up[...] = drawn(*weight.lora_up.shape)
    down, up = (np.asarray(a[...], np.float64) for a in (weight.lora_down, weight.lora_up))
    whole = np.asarray(dense(base), np.float64) + 6.0 / 2 * np.tensordot(down, up, 1)
    expected = np.tensordot(np.asarray(x, np.float64), whole, inputs)
    assert_close(linear(x, weight, inputs), expected, terms=8 + 2 * 8 + 8)
    assert_close(weight.dense(), whole, terms=2 + 4)
    assert weight.shape == sizes


def test_a_language_model_with_updates_is_the_one_that_is_exported() -> None:
    def make(rngs: nnx.Rngs) -> LanguageModel:
        return LanguageModel(CONFIG, rngs=rngs, lora=EVERYTHING)

    model = filled(make)
    tokens = jnp.asarray(RNG.integers(0, 16, (2, 6)), jnp.int32)
    places = jnp.tile(jnp.arange(6), (2, 1))
    logits = jax.jit(lambda model: model(tokens, places, jnp.ones_like(tokens)))
    updated = logits(model)
    make_dense(model)
    plain = nnx.eval_shape(lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0)))
    assert {n: a.shape for n, a in to_flat(nnx.state(model)).items()} == {
        n: a.shape for n, a in to_flat(nnx.state(plain)).items()
    }
    np.testing.assert_allclose(logits(model), updated, rtol=1e-4, atol=1e-4)


def test_a_target_that_names_nothing_is_told() -> None:
    with pytest.raises(UserError, match="'attention/q', which names no matrix"):
        LanguageModel(CONFIG, rngs=nnx.Rngs(0), lora=LoRAConfig(rank=2, targets=("attention/q",)))


def shapes_of(model: nnx.Module) -> dict[str, jax.Array]:
    return to_flat(nnx.state(model))


def test_updates_alone_train_and_everything_lies_as_its_weight_does() -> None:
    model = nnx.eval_shape(lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0), lora=EVERYTHING))
    shapes = shapes_of(model)
    trained = rules.trainable_names("language_modelling", shapes)
    assert trained and {name.rpartition("/")[2] for name in trained} == {"lora_down", "lora_up"}
    assert len(trained) == 2 * (len(INPUT_AXES) - 1)
    places = rules.shardings("language_modelling", shapes, make_mesh(MeshConfig(4, 1, 2)))

    def spec(name: str) -> tuple[Any, ...]:
        return tuple(places[f"layers/{name}"].spec)

    plain = nnx.eval_shape(lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0)))
    whole = rules.shardings("language_modelling", shapes_of(plain), make_mesh(MeshConfig(4, 1, 2)))
    for name in ("attention/query", "attention/out", "feed_forward/down"):
        assert spec(f"{name}/base") == tuple(whole[f"layers/{name}"].spec)
    assert spec("attention/query/lora_down") == (None, None, None)
    assert spec("attention/query/lora_up") == (None, None, "model", None)
    assert spec("attention/out/lora_down") == (None, "model", None, None)
    assert spec("attention/out/lora_up") == (None, None, None)
    assert spec("feed_forward/down/lora_down") == (None, "model", None)


def test_integers_and_their_scales_lie_as_their_weight_does() -> None:
    def make() -> LanguageModel:
        model = LanguageModel(CONFIG, rngs=nnx.Rngs(0))
        for name, inputs in INPUT_AXES.items():
            half, attribute = name.split("/")
            module = getattr(model.layers, half)
            if (weight := getattr(module, attribute)) is not None:
                setattr(module, attribute, Int8Weight(weight[...], inputs, stacked=1))
        return model

    shapes = shapes_of(nnx.eval_shape(make))
    places = rules.shardings("language_modelling", shapes, make_mesh(MeshConfig(4, 1, 2)))

    def spec(name: str) -> tuple[Any, ...]:
        return tuple(places[f"layers/{name}"].spec)

    assert spec("attention/query/int8") == (None, None, "model", None)
    assert spec("attention/query/int8_scale") == (None, "model", None)
    assert spec("attention/out/int8") == (None, "model", None, None)
    assert spec("attention/out/int8_scale") == (None, None)
    assert spec("feed_forward/up/int8_scale") == (None, "model")
    assert not any("int8" in n for n in rules.trainable_names("language_modelling", shapes))


def test_a_layer_of_integers_is_nearly_the_layer() -> None:
    layer = filled(lambda rngs: DecoderLayer(CONFIG, rngs=rngs))
    x, places = drawn(2, 5, 8), jnp.tile(jnp.arange(5), (2, 1))
    run = jax.jit(lambda layer: layer(x, places, Packing((jnp.ones((2, 5), jnp.int32),)), None)[0])
    before = run(layer)
    for name, inputs in INPUT_AXES.items():
        half, attribute = name.split("/")
        module = getattr(layer, half)
        if (weight := getattr(module, attribute)) is not None:
            setattr(module, attribute, Int8Weight(weight[...], inputs))
    after = run(layer)
    assert 0 < np.abs(after - before).max() < 0.05 * np.abs(before).max()
