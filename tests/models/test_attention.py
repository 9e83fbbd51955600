"""Attention against float64 numpy, written as sums over positions."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.configuring import from_config, to_config
from flamingo_jax.experiment import (
    AttentionConfig,
    LanguageModelConfig,
    PositionsConfig,
    RotaryScaling,
)
from flamingo_jax.models import attention, ops
from flamingo_jax.models.cache import LINE, Beams, Cache
from flamingo_jax.models.packing import Packing
from flamingo_jax.models.positions import alibi_slopes, sinusoids
from tests.models.filling import filled
from tests.models.test_positions import published_frequency
from tests.rounding import assert_close

TERMS = 8 + 2 * 4 + 2 * 7 + 8 + 8
"""Projections, scores of content and of position, the softmax over at most 7 keys and its sum
of values, the map out of two heads of 4, and norms.
"""
CONFIG = LanguageModelConfig(
    width=8,
    attention=AttentionConfig(heads=2, head_width=4),
)


def make(**changes: object) -> attention.SelfAttention:
    config = dataclasses.replace(CONFIG, positions=PositionsConfig(**changes))  # type: ignore[arg-type]
    return attention.SelfAttention(config, out_scale=1.0, rngs=nnx.Rngs(0))


def changed(config: LanguageModelConfig, fields: dict[str, Any]) -> LanguageModelConfig:
    """The config with other values of these dotted fields."""
    new = to_config(config)
    for name, value in fields.items():
        *groups, field = name.split(".")
        given = dataclasses.asdict(value) if isinstance(value, RotaryScaling) else value
        functools.reduce(getattr, groups, new)[field] = given
    return from_config(LanguageModelConfig, new)


def reference_transformer_xl(
    module: attention.SelfAttention, x: np.ndarray, segments: np.ndarray
) -> np.ndarray:
    """Transformer-XL attention (Dai et al. 2019, equation of section 3.3), token by token."""
    w = {
        name: np.asarray(getattr(module, name)[...], np.float64)
        for name in (
            "query",
            "key",
            "value",
            "out",
            "position",
            "content_bias",
            "position_bias",
        )
    }
    rows, length, width = x.shape
    codes = np.asarray(sinusoids(length, width), np.float64)
    heads, head_width = w["query"].shape[1:]
    out = np.zeros(x.shape)
    for b in range(rows):
        for i in range(length):
            for h in range(heads):
                query = x[b, i] @ w["query"][:, h]
                seen = [
                    j
                    for j in range(i + 1)
                    if segments[b, j] == segments[b, i] and segments[b, i] > 0
                ]
                if not seen:
                    continue
                scores = []
                for j in seen:
                    key, relative = x[b, j] @ w["key"][:, h], codes[i - j] @ w["position"][:, h]
                    scores.append(
                        (
                            (query + w["content_bias"][h]) @ key
                            + (query + w["position_bias"][h]) @ relative
                        )
                        / np.sqrt(head_width)
                    )
                p = np.exp(np.array(scores) - max(scores))
                p /= p.sum()
                out[b, i] += (
                    sum(p[k] * (x[b, j] @ w["value"][:, h]) for k, j in enumerate(seen))
                    @ w["out"][h]
                )
    return out


@pytest.fixture(scope="module")
def module() -> attention.SelfAttention:
    m = make()
    m.content_bias[...] = jax.random.normal(jax.random.key(1), (2, 4))
    m.position_bias[...] = jax.random.normal(jax.random.key(2), (2, 4))
    return m


def test_transformer_xl_attention_equals_its_equation(module: attention.SelfAttention) -> None:
    x = np.random.default_rng(0).normal(size=(2, 7, 8))
    segments = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1]])
    ours, _ = module(
        jnp.asarray(x, jnp.float32),
        jnp.zeros((2, 7), jnp.int32),
        Packing((jnp.asarray(segments),)),
        None,
    )
    assert_close(ours, reference_transformer_xl(module, x, segments), TERMS)


@pytest.mark.parametrize("positions", ["transformer_xl", "rotary", "alibi", "learned"])
def test_decoding_with_a_cache_equals_the_whole_row(positions: str) -> None:
    module = make(kind=positions)
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    places = jnp.tile(jnp.arange(6), (2, 1))
    whole, _ = module(x, places, Packing((jnp.ones((2, 6), jnp.int32),)), None)
    cache = Cache(jnp.zeros((2, 2, 9, 4)), jnp.zeros((2, 2, 9, 4)))
    parts = []
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        part, cache = module(x[:, start:stop], places[:, start:stop], LINE, cache)
        parts.append(part)
    assert_close(jnp.concatenate(parts, 1), whole, TERMS)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("positions", ["transformer_xl", "rotary", "alibi", "learned"])
def test_beams_over_one_cache_equal_whole_rows(positions: str, window: int) -> None:
    """Rows of 3 and of 2 tokens, and three tokens of each of two continuations: at the second
    both follow what was the last one, at the third they change places.
    """
    config = changed(CONFIG, {"attention.window": window, "positions.kind": positions})
    module = attention.SelfAttention(config, out_scale=1.0, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3 + 3 * 2, 8))
    lengths = jnp.array([3, 2])
    before = jnp.tile(jnp.arange(3), (2, 1))
    cache = Cache(jnp.zeros((2, 2, 9, 4)), jnp.zeros((2, 2, 9, 4)))
    _, cache = module(x[:, :3], jnp.where(before < lengths[:, None], before, 9), LINE, cache)
    held = jnp.concatenate([before, lengths[:, None] + jnp.arange(6) // 2], 1)
    paths = [[[0], [1]], [[1, 2], [1, 3]], [[1, 3, 4], [1, 2, 5]]]
    for step, of_step in enumerate(paths):
        seen = np.zeros((2, 2, 9), bool)
        seen[:, :, :3] = (before < lengths[:, None])[:, None]
        for beam, path in enumerate(of_step):
            seen[:, beam, [3 + slot for slot in path]] = True
        slots = jnp.tile(3 + 2 * step + jnp.arange(2), (2, 1))
        places = jnp.broadcast_to(lengths[:, None] + step, (2, 2))
        new = x[:, 3 + 2 * step : 5 + 2 * step]
        found, cache = module(new, places, Beams(slots, held, jnp.asarray(seen)), cache)
        for row, length in enumerate([3, 2]):
            for beam, path in enumerate(of_step):
                text = jnp.concatenate([x[row, :length], x[row, jnp.array(path) + 3]])[None]
                count = text.shape[1]
                packing = Packing((jnp.ones((1, count), jnp.int32),))
                whole, _ = module(text, jnp.arange(count)[None], packing, None)
                assert_close(found[row, beam], whole[0, -1], TERMS)


def test_padding_never_enters_a_cache() -> None:
    module = make(kind="rotary")
    cache = Cache(jnp.zeros((1, 2, 4, 4)), jnp.zeros((1, 2, 4, 4)))
    _, cache = module(jnp.ones((1, 3, 8)), jnp.array([[0, 4, 4]]), LINE, cache)
    assert np.asarray(cache.key[0, :, 0]).any() and not np.asarray(cache.key[0, :, 1:]).any()


def test_a_fully_masked_query_gets_exactly_zero() -> None:
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 4))
    mask = jnp.array([[True, False, True], [False, False, False], [False, True, False]])[None, None]
    out = attention.attend(x, x, x, mask)
    assert not np.asarray(out[0, 1]).any()
    assert_close(out[0, 2], x[0, 1], terms=4 + 3)


OPEN = {
    "llama": {"attention.kv_heads": 2, "positions.scaling": RotaryScaling(original_length=30)},
    "qwen2": {"attention.kv_heads": 1, "attention.bias": True},
    "qwen3": {"attention.kv_heads": 2, "attention.query_key_norm": "head"},
    "gpt_neox": {
        "attention.kv_heads": 4,
        "attention.bias": True,
        "attention.out_bias": True,
        "positions.fraction": 0.5,
        "norm.kind": "layer",
    },
    "mpt": {
        "attention.kv_heads": 4,
        "attention.query_key_norm": "width",
        "positions.kind": "alibi",
        "norm.kind": "layer",
        "norm.bias": False,
    },
}


def reference_open(
    module: attention.SelfAttention, config: LanguageModelConfig, x: np.ndarray
) -> np.ndarray:
    """Grouped-query attention with rotary positions of one text [L, D], token by token and pair
    by pair.
    """

    def value_of(a: nnx.Param | None) -> Any:
        return None if a is None else np.asarray(a[...], np.float64)

    w = {
        name: value_of(getattr(module, name))
        for name in (
            "query",
            "key",
            "value",
            "out",
            "query_bias",
            "key_bias",
            "value_bias",
            "out_bias",
        )
    }
    form, positions = config.attention, config.positions
    half = int(form.head_width * positions.fraction) // 2

    def normed(h: np.ndarray, norm: Any) -> np.ndarray:
        if config.norm.kind == "layer":
            h = h - h.mean()
        return h / np.sqrt(np.mean(h**2) + config.norm.eps) * value_of(norm.scale)

    def head(name: str, place: int, number: int) -> np.ndarray:
        bias = w[f"{name}_bias"]
        h = np.einsum("w,whd->hd", x[place], w[name]) + (0 if bias is None else bias)
        norm = None if name == "value" else getattr(module, f"{name}_norm")
        if form.query_key_norm == "width" and norm is not None:
            h = normed(h.reshape(-1), norm).reshape(h.shape)
        h = h[number]
        if form.query_key_norm == "head" and norm is not None:
            h = normed(h, norm)
        if name == "value" or positions.kind != "rotary":
            return h
        turned = h.copy()
        for pair in range(half):
            angle = place * published_frequency(pair, positions.scaling, half, positions.base)
            one, other = h[pair], h[pair + half]
            turned[pair] = one * math.cos(angle) - other * math.sin(angle)
            turned[pair + half] = other * math.cos(angle) + one * math.sin(angle)
        return turned

    slopes = alibi_slopes(form.heads) if positions.kind == "alibi" else (0.0,) * form.heads
    out = np.zeros_like(x)
    for i in range(len(x)):
        for number in range(form.heads):
            shared = number // (form.heads // form.kv_heads)
            scores = np.array(
                [
                    head("query", i, number) @ head("key", j, shared) / math.sqrt(form.head_width)
                    - slopes[number] * (i - j)
                    for j in range(i + 1)
                ]
            )
            weights = np.exp(scores - scores.max())
            out[i] += (
                sum(p * head("value", j, shared) for j, p in enumerate(weights / weights.sum()))
                @ w["out"][number]
            )
    return out + (0 if w["out_bias"] is None else w["out_bias"])


@pytest.mark.parametrize("family", OPEN)
def test_the_open_families_attention_equals_its_equation(family: str) -> None:
    config = changed(
        CONFIG,
        {"attention.heads": 4, "positions.kind": "rotary", "positions.base": 100.0} | OPEN[family],
    )
    module = filled(lambda rngs: attention.SelfAttention(config, out_scale=1.0, rngs=rngs))
    x = np.random.default_rng(0).normal(size=(2, 6, 8))
    places = jnp.tile(jnp.arange(6), (2, 1))
    whole, _ = module(
        jnp.asarray(x, jnp.float32), places, Packing((jnp.ones((2, 6), jnp.int32),)), None
    )
    for row, text in enumerate(x):
        assert_close(whole[row], reference_open(module, config, text), TERMS)
    empty = jnp.zeros((2, config.attention.kv_heads, 8, 4))
    first, cache = module(
        jnp.asarray(x[:, :4], jnp.float32), places[:, :4], LINE, Cache(empty, empty)
    )
    second, _ = module(jnp.asarray(x[:, 4:], jnp.float32), places[:, 4:], LINE, cache)
    assert_close(jnp.concatenate([first, second], 1), whole, TERMS)


@pytest.mark.parametrize("keys", [2, 6])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_every_platforms_form_is_the_same_function(
    platform: str, added: bool, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads that share keys, an added score, a query that sees nothing; the gradient in finite
    differences.
    """
    monkeypatch.setattr(ops, "platform", lambda: platform)
    draw = np.random.default_rng(1)
    arrays = [
        draw.normal(size=(2, length, heads, 8))
        for length, heads in ((4, 6), (10, keys), (10, keys))
    ]
    arrays += [draw.normal(size=(2, 6, 4, 10))] if added else []
    mask = draw.random((2, 1, 4, 10)) < 0.5
    mask[1, :, 2] = False

    def equation(
        query: np.ndarray, key: np.ndarray, value: np.ndarray, scores: np.ndarray | float = 0.0
    ) -> np.ndarray:
        key, value = (np.repeat(a, 6 // keys, axis=2) for a in (key, value))
        p = np.exp((np.einsum("blhd,bshd->bhls", query, key) + scores) / math.sqrt(8)) * mask
        return np.einsum("bhls,bshd->blhd", p / np.maximum(p.sum(-1, keepdims=True), 1e-300), value)

    def ours(*given: jax.Array) -> jax.Array:
        return attention.attend(*given[:3], jnp.asarray(mask), *given[3:])

    given = [jnp.asarray(a, jnp.float32) for a in arrays]
    assert_close(ours(*given), equation(*arrays), terms=8 + 2 * 10)
    assert not np.asarray(ours(*given)[1, 2]).any()
    wanted = draw.normal(size=arrays[0].shape)
    gradients = jax.grad(lambda *a: (ours(*a) * wanted).sum(), tuple(range(len(given))))(*given)
    for place, gradient in enumerate(gradients):
        way = draw.normal(size=arrays[place].shape)
        moved = [
            equation(*(a + step * way if n == place else a for n, a in enumerate(arrays)))
            for step in (1e-5, -1e-5)
        ]
        slope = ((moved[0] - moved[1]) * wanted).sum() / 2e-5
        # The sum of as many products as the array has, and the finite difference.
        products = np.asarray(gradient) * way
        assert_close(products.sum(), slope, terms=2 * (8 + 2 * 10), size=np.abs(products).sum())


@pytest.mark.parametrize("keys", [2, 6])
def test_the_fused_form_is_the_same_function(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With XLA's form of the call in the place of cuDNN's, which wants a GPU: heads that share
    keys, a query that sees nothing, the gradient.
    """
    draw = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(draw.normal(size=(2, length, heads, 8)), jnp.bfloat16)
        for length, heads in ((4, 6), (10, keys), (10, keys))
    )
    mask = jnp.asarray(draw.random((2, 1, 4, 10)) < 0.5).at[1, :, 2].set(False)

    def total(*arrays: jax.Array) -> jax.Array:
        return jnp.square(attention.attend(*arrays, mask).astype(jnp.float32)).sum()

    def values_and_gradients() -> list[np.ndarray]:
        return [
            np.asarray(a, np.float32)
            for a in (
                attention.attend(query, key, value, mask),
                *jax.grad(total, (0, 1, 2))(query, key, value),
            )
        ]

    plain = values_and_gradients()
    calls: list[str] = []
    fused = jax.nn.dot_product_attention

    def call(*arrays: jax.Array, implementation: str, **rest: object) -> jax.Array:
        calls.append(implementation)
        return fused(*arrays, implementation="xla", **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "platform", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", call)
    for found, expected in zip(values_and_gradients(), plain, strict=True):
        np.testing.assert_allclose(found, expected, atol=0.03 * np.abs(expected).max())
    assert (
        set(calls) == {"cudnn"}
        and not np.asarray(attention.attend(query, key, value, mask)[1, 2]).any()
    )
