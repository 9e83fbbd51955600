"""Attention against float64 numpy, written as sums over positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.models import attention


def reference_transformer_xl(module: attention.SelfAttention, x: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Transformer-XL attention (Dai et al. 2019, equation of section 3.3), token by token."""
    w = {name: np.asarray(getattr(module, name)[...], np.float64) for name in ("query", "key", "value", "out", "position", "content_bias", "position_bias")}
    rows, length, width = x.shape
    codes = np.asarray(attention.sinusoids(length, width), np.float64)
    heads, head_width = w["query"].shape[1:]
    out = np.zeros(x.shape)
    for b in range(rows):
        for i in range(length):
            for h in range(heads):
                query = x[b, i] @ w["query"][:, h]
                seen = [j for j in range(i + 1) if segments[b, j] == segments[b, i] and segments[b, i] > 0]
                if not seen:
                    continue
                scores = []
                for j in seen:
                    key, relative = x[b, j] @ w["key"][:, h], codes[i - j] @ w["position"][:, h]
                    scores.append(((query + w["content_bias"][h]) @ key + (query + w["position_bias"][h]) @ relative) / np.sqrt(head_width))
                p = np.exp(np.array(scores) - max(scores))
                p /= p.sum()
                out[b, i] += sum(p[k] * (x[b, j] @ w["value"][:, h]) for k, j in enumerate(seen)) @ w["out"][h]
    return out


@pytest.fixture(scope="module")
def module() -> attention.SelfAttention:
    m = attention.SelfAttention(8, 2, 4, positions="transformer_xl", rope_base=1e4, out_scale=1.0, rngs=nnx.Rngs(0))
    m.content_bias[...] = jax.random.normal(jax.random.key(1), (2, 4))
    m.position_bias[...] = jax.random.normal(jax.random.key(2), (2, 4))
    return m


def test_transformer_xl_attention_equals_its_equation(module: attention.SelfAttention) -> None:
    x = np.random.default_rng(0).normal(size=(2, 7, 8))
    segments = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1]])
    ours, _ = module(jnp.asarray(x, jnp.float32), jnp.zeros((2, 7), jnp.int32), jnp.asarray(segments), None)
    np.testing.assert_allclose(ours, reference_transformer_xl(module, x, segments), atol=1e-5)


@pytest.mark.parametrize("positions", ["transformer_xl", "rotary"])
def test_decoding_with_a_cache_equals_the_whole_row(positions: str) -> None:
    module = attention.SelfAttention(8, 2, 4, positions=positions, rope_base=1e4, out_scale=1.0, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    places = jnp.tile(jnp.arange(6), (2, 1))
    whole, _ = module(x, places, jnp.ones((2, 6), jnp.int32), None)
    cache = attention.Cache(jnp.zeros((2, 9, 2, 4)), jnp.zeros((2, 9, 2, 4)))
    parts = []
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        part, cache = module(x[:, start:stop], places[:, start:stop], None, cache)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


def test_padding_never_enters_a_cache() -> None:
    module = attention.SelfAttention(8, 2, 4, positions="rotary", rope_base=1e4, out_scale=1.0, rngs=nnx.Rngs(0))
    cache = attention.Cache(jnp.zeros((1, 4, 2, 4)), jnp.zeros((1, 4, 2, 4)))
    _, cache = module(jnp.ones((1, 3, 8)), jnp.array([[0, 4, 4]]), None, cache)
    assert np.asarray(cache.key[0, 0]).any() and not np.asarray(cache.key[0, 1:]).any()


def test_rotation_keeps_scores_a_function_of_distance() -> None:
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    def score(i: int, j: int) -> float:
        return float(jnp.sum(attention.rotate(q, jnp.array([[i]]), 1e4) * attention.rotate(k, jnp.array([[j]]), 1e4)))

    assert score(5, 3) == pytest.approx(score(12, 10), abs=1e-5)
    assert abs(score(5, 3) - score(5, 1)) > 1e-3


def test_a_fully_masked_query_gets_exactly_zero() -> None:
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 4))
    mask = jnp.array([[True, False, True], [False, False, False], [False, True, False]])[None, None]
    out = attention.attend(x, x, x, mask)
    assert not np.asarray(out[0, 1]).any()
    np.testing.assert_allclose(out[0, 2], x[0, 1], atol=1e-6)


def test_a_position_bias_makes_heads_prefer_distances_from_the_start() -> None:
    make = lambda bias: attention.SelfAttention(
        8, 2, 4, positions="transformer_xl", rope_base=1e4, position_bias=bias, out_scale=1.0, rngs=nnx.Rngs(0)
    )
    assert not make(0.0).position_bias[...].any()
    scores = make(8.0)._position_scores(jnp.zeros((1, 5, 2, 4)), jnp.arange(5)[None], 5, cached=False)
    # Without any content, a key's score depends on its distance alone.
    np.testing.assert_allclose(scores[0, :, 4, 3], scores[0, :, 3, 2], rtol=1e-5)
    assert np.ptp(scores[0, :, 4, :], axis=-1).min() > 1
