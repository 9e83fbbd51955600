"""The text encoder against a float64 numpy version of BERT's form."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.experiment import TextEncoderConfig
from flamingo_jax.models.text_encoder import TextEncoder
from flamingo_jax.pytrees import from_flat, to_flat
from tests.models.filling import filled
from tests.rounding import assert_close

TERMS = 16 + 2 * (8 + 4 + 6 + 8 + 16 + 8 + 32 + 16)
"""The first norm; in each of two layers projections, scores, 6 keys, the map out, a norm, two
products and a norm.
"""
CONFIG = TextEncoderConfig(vocab_size=11, layers=2, width=8, heads=2, max_length=6)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return filled(lambda rngs: TextEncoder(CONFIG, rngs=rngs))


def norm(x: np.ndarray, parameters: dict[str, Any]) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * parameters[
        "scale"
    ] + parameters["bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def bert(tokens: np.ndarray, parameters: dict[str, Any]) -> np.ndarray:
    """One text of real tokens alone, head by head and token by token."""
    x = norm(
        parameters["embedding"][tokens] + parameters["position_embedding"][: len(tokens)],
        parameters["embedding_norm"],
    )
    for number in range(CONFIG.layers):
        layer = jax.tree.map(lambda a, number=number: a[number], parameters["layers"])
        attention = layer["attention"]
        attended = np.zeros_like(x)
        for head in range(CONFIG.heads):
            query, key, value = (
                x @ attention[name][:, head] + attention[f"{name}_bias"][head]
                for name in ("query", "key", "value")
            )
            for place in range(len(tokens)):
                weights = np.exp(key @ query[place] / math.sqrt(CONFIG.width // CONFIG.heads))
                attended[place] += (weights / weights.sum()) @ value @ attention["out"][head]
        x = norm(x + attended + attention["out_bias"], layer["attention_norm"])
        feed = layer["feed_forward"]
        hidden = gelu(x @ feed["up"] + feed["up_bias"]) @ feed["down"] + feed["down_bias"]
        x = norm(x + hidden, layer["feed_forward_norm"])
    return x


def test_equals_the_published_form_whatever_the_padding(encoder: TextEncoder) -> None:
    parameters = from_flat(
        {name: np.asarray(a, np.float64) for name, a in to_flat(nnx.state(encoder)).items()}
    )
    tokens = np.random.default_rng(1).integers(0, 11, (3, 6)).astype(np.int32)
    lengths = (6, 4, 1)
    out = encoder(jnp.asarray(tokens), jnp.arange(6) < jnp.array(lengths)[:, None])
    assert out.shape == (3, 6, 8)
    for row, length in enumerate(lengths):
        assert_close(out[row, :length], bert(tokens[row, :length], parameters), TERMS)


def test_size_of_bert_large() -> None:
    """Devlin et al.: 24 layers of 1,024; 302.3 M in the layers and 1,024 more for each word,
    position and embedding norm.
    """
    model = nnx.eval_shape(lambda: TextEncoder(TextEncoderConfig(), rngs=nnx.Rngs(0)))
    count = sum(math.prod(a.shape) for a in to_flat(nnx.state(model)).values())
    assert count == 24 * (12 * 1024**2 + 13 * 1024) + 1024 * (32_000 + 64 + 2)


def test_computes_in_the_given_dtype() -> None:
    model = filled(lambda rngs: TextEncoder(CONFIG, rngs=rngs, dtype=jnp.bfloat16))
    assert model(jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool)).dtype == jnp.bfloat16
    assert {a.dtype for a in to_flat(nnx.state(model)).values()} == {jnp.dtype("float32")}
