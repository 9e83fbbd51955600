"""int8 weights of whole parts: what they compute, what they keep for the backward pass, which
weights they are.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import Jaxpr

from flamingo_jax.experiment import (
    AttentionConfig,
    FeedForwardConfig,
    LanguageModelConfig,
    PositionsConfig,
    VisionConfig,
    ViTConfig,
)
from flamingo_jax.models import nfnet
from flamingo_jax.models.int8 import Int8Filters, Int8Table, Int8Weight
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.models.language_model_config import LoRAConfig
from flamingo_jax.models.layers import linear, lookup, unembed
from flamingo_jax.models.nfnet import NFNet, WSConv
from flamingo_jax.models.quantised import quantise_part
from flamingo_jax.models.vision import vision_encoder
from flamingo_jax.models.weights import make_dense
from flamingo_jax.pytrees import to_flat
from flamingo_jax.tasks.flops import _inner
from flamingo_jax.weight_parts import is_scale, weight_part
from tests.models.filling import ONE_STAGE, filled
from tests.rounding import assert_close

RNG = np.random.default_rng(0)
CHINCHILLA = LanguageModelConfig(
    vocab_size=24,
    layers=3,
    width=16,
    attention=AttentionConfig(heads=2, head_width=8),
    feed_forward=FeedForwardConfig(width=40),
)
LLAMA = dataclasses.replace(
    CHINCHILLA,
    positions=PositionsConfig("rotary"),
    attention=AttentionConfig(heads=2, kv_heads=1, head_width=8),
    feed_forward=FeedForwardConfig(width=40, activation="silu", gated=True),
    tied_embeddings=False,
)
TOKENS = jnp.asarray(RNG.integers(0, 24, (2, 7)), jnp.int32)
PLACES = jnp.tile(jnp.arange(7), (2, 1))


def drawn(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def copy(model: Any) -> Any:
    return nnx.merge(*nnx.split(model))


def quantised(model: Any) -> Any:
    found = copy(model)
    quantise_part(found)
    return found


def test_a_table_is_looked_up_and_multiplied_as_what_it_stands_for() -> None:
    w, x = drawn(11, 6), drawn(3, 6)
    table = Int8Table(w)
    # A scale per row, by hand.
    scale = np.abs(np.asarray(w, np.float64)).max(1) / 127
    integers = np.round(np.asarray(w, np.float64) / scale[:, None])
    np.testing.assert_array_equal(table.int8[...], integers)
    whole = integers * scale[:, None]
    assert_close(lookup(table, jnp.asarray([[3, 0], [10, 3]])), whole[[[3, 0], [10, 3]]], terms=2)
    expected = np.asarray(x, np.float64) @ whole.T
    assert_close(unembed(x, table), expected, terms=8)
    gradient = jax.grad(lambda x: unembed(x, table)[0, 4])(x)
    assert_close(gradient[0], whole[4], terms=8)
    assert unembed(x.astype(jnp.bfloat16), table).dtype == jnp.bfloat16


def test_filters_are_standardised_and_then_quantised() -> None:
    conv = filled(lambda rngs: WSConv(8, 6, 3, stride=2, groups=2, rngs=rngs))
    x = drawn(2, 9, 9, 8)
    before = conv(x)
    w = np.asarray(conv.weight[...], np.float64)
    centred = w - w.mean((0, 1, 2))
    standard = centred / np.sqrt(w.var((0, 1, 2)) * 36)
    quantise_part(conv)  # type: ignore[arg-type]
    scale = np.abs(standard).max((0, 1, 2)) / 127
    np.testing.assert_array_equal(conv.weight.int8[...], np.round(standard / scale))
    whole = np.round(standard / scale) * scale * np.asarray(conv.gain[...], np.float64)
    expected = jax.lax.conv_general_dilated(
        x,
        jnp.asarray(whole, jnp.float32),
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    after = conv(x)
    assert_close(after, np.asarray(expected, np.float64) + np.asarray(conv.bias[...]), terms=80)
    assert 0 < np.abs(after - before).max() < 0.02 * np.abs(before).max()


def relative(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("config", "lora"),
    [
        (CHINCHILLA, None),
        (LLAMA, LoRAConfig(rank=2, targets=("attention/(query|out)", "feed_forward/down"))),
    ],
    ids=["chinchilla", "llama with low-rank updates"],
)
def test_a_language_model_is_the_one_of_the_dequantised_weights(
    config: LanguageModelConfig, lora: LoRAConfig | None
) -> None:
    model = filled(lambda rngs: LanguageModel(config, rngs=rngs, lora=lora))
    integers = quantised(model)
    arrays = to_flat(nnx.state(integers))
    for name, array in arrays.items():
        if array.dtype != jnp.int8 and not is_scale(name) and weight_part(name) is None:
            assert name.endswith(("scale", "bias")), f"{name} is not quantised"
    floats = copy(integers)
    make_dense(floats)
    assert not any("int8" in name for name in to_flat(nnx.state(floats)))
    run = jax.jit(lambda model: model(TOKENS, PLACES, jnp.ones_like(TOKENS)))
    found, expected = run(integers), run(floats)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    # The integers are those of a nearby model: half a step of 1 / 127 of each channel.
    assert 1e-4 < relative(found, run(model)) < 0.05

    if lora is not None:
        return

    @jax.jit
    def decoded(model: Any) -> jax.Array:
        return model.decode(TOKENS, PLACES, model.init_cache(2, 8))[0]

    np.testing.assert_allclose(decoded(integers), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nfnet", "vit"])
def test_an_encoder_of_integers_is_nearly_the_encoder(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(nfnet.VARIANTS, "one_stage", ONE_STAGE)
    vit = ViTConfig(patch_size=8, layers=2, width=24, heads=2, feed_forward=48)
    config = VisionConfig(variant="one_stage", image_size=16, vit=vit if kind == "vit" else None)
    model = filled(lambda rngs: vision_encoder(config, rngs=rngs))
    integers = quantised(model)
    state = to_flat(nnx.state(integers))
    left = [name for name, array in state.items() if array.dtype != jnp.int8 and not is_scale(name)]
    assert all(name.endswith(("scale", "bias", "gain", "embedding")) for name in left), (
        "a matrix is not quantised"
    )
    images = drawn(2, 16, 16, 3)
    run = jax.jit(lambda model: model(images))
    error = relative(run(integers), run(model))
    assert 1e-4 < error < 0.03
    # `prepared`, for many batches, makes no float copy of the integers.
    ready = to_flat(nnx.state(integers.prepared(jnp.float32)))
    assert all(ready[name] is a or (ready[name] == a).all() for name, a in state.items())
    assert sum(a.nbytes for a in ready.values()) == sum(a.nbytes for a in state.values())
    if isinstance(integers, NFNet):
        assert isinstance(integers.final.weight, Int8Filters)


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation.params):
            yield from equations(inner)


def test_no_float_copy_of_a_stack_is_kept_for_the_backward_pass() -> None:
    """The stack is what a scan over layers saves: integers, which are its inputs anyway."""
    layers, width = 5, 16
    stack = Int8Weight(drawn(layers, width, width), 1, stacked=1)
    graph, state = nnx.split(stack)

    def loss(x: jax.Array, state: Any) -> jax.Array:
        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return jnp.tanh(linear(x, nnx.merge(graph, layer))), None

        return jax.lax.scan(body, x, state)[0].sum()

    x = drawn(3, width).astype(jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(x, state).jaxpr
    floats = [
        variable.aval.shape
        for equation in equations(jaxpr)
        for variable in equation.outvars
        if variable.aval.shape[:1] == (layers,)
        and variable.aval.shape[1:] == (width, width)
        and jnp.issubdtype(variable.aval.dtype, jnp.floating)
    ]
    assert not floats
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 2, "the gradient of the integers is computed"


def test_decoding_keeps_no_float_copy_of_a_stack() -> None:
    """A loop over tokens around the loop over layers: XLA may not hoist the conversion."""
    config = dataclasses.replace(
        LLAMA, layers=12, width=64, feed_forward=FeedForwardConfig(width=512)
    )

    def make() -> LanguageModel:
        model = LanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        quantise_part(model)
        return model

    graph, state = nnx.split(nnx.eval_shape(make))

    def decode(state: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graph, state)

        def step(carry: Any, place: jax.Array) -> tuple[Any, jax.Array]:
            tokens, cache = carry
            logits, cache = model.decode(tokens, jnp.full_like(tokens, place), cache)
            tokens = jnp.argmax(logits, -1).astype(jnp.int32)
            return (tokens, cache), tokens

        return jax.lax.scan(step, (tokens, model.init_cache(1, 8)), jnp.arange(8))[1]

    compiled = jax.jit(decode).lower(state, jax.ShapeDtypeStruct((1, 1), jnp.int32)).compile()
    memory = compiled.memory_analysis()
    integers = sum(a.size for a in jax.tree.leaves(state) if a.dtype == jnp.int8)
    assert memory is not None and integers > 8e5
    # A bfloat16 copy of the stacks would be 2 bytes for each of them.
    assert memory.temp_size_in_bytes < 0.8 * integers, memory.temp_size_in_bytes / integers
