"""BERT-form text encoder (Devlin et al. 2019): learned positions, a norm after each residual sum, GELU, biases everywhere."""

import jax
import jax.numpy as jnp
from flax import nnx

from flamingo_jax.experiment import TextEncoderConfig
from flamingo_jax.models.attention import attend
from flamingo_jax.models.layers import FeedForward, LayerNorm, fan_in_normal, linear, scan_layers, stack

Array = jax.Array


class EncoderLayer(nnx.Module):
    """x = Norm(x + Attention(x)); x = Norm(x + FeedForward(x))."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        shape = (config.width, config.heads, config.width // config.heads)
        self.query, self.key, self.value = (fan_in_normal(rngs, shape) for _ in range(3))
        self.query_bias, self.key_bias, self.value_bias = (nnx.Param(jnp.zeros(shape[1:])) for _ in range(3))
        self.out = fan_in_normal(rngs, (*shape[1:], config.width), config.width)
        self.out_bias = nnx.Param(jnp.zeros((config.width,)))
        self.attention_norm = LayerNorm(config.width, 1e-12)
        self.feed_forward = FeedForward(config.width, 4 * config.width, "gelu", bias=True, rngs=rngs)
        self.feed_forward_norm = LayerNorm(config.width, 1e-12)

    def __call__(self, x: Array, mask: Array) -> Array:
        """x [B, L, W], mask bool [B, 1, 1, L]."""
        weights = ((self.query, self.query_bias), (self.key, self.key_bias), (self.value, self.value_bias))
        query, key, value = (linear(x, w[...]) + b[...].astype(x.dtype) for w, b in weights)
        x = self.attention_norm(x + linear(attend(query, key, value, mask), self.out[...], 2) + self.out_bias[...].astype(x.dtype))
        return self.feed_forward_norm(x + self.feed_forward(x))


class TextEncoder(nnx.Module):
    """tokens -> one vector a token."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.dtype = dtype
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.width)))
        self.position_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.max_length, config.width)))
        self.embedding_norm = LayerNorm(config.width, 1e-12)
        self.layers = stack(lambda r: EncoderLayer(config, rngs=r), config.layers, rngs)

    def __call__(self, tokens: Array, mask: Array) -> Array:
        """int32 [B, L] and bool [B, L], True on real tokens -> [B, L, W]."""
        x = self.embedding[...][tokens] + self.position_embedding[...][: tokens.shape[1]]
        x = self.embedding_norm(x.astype(self.dtype))
        keys = mask[:, None, None, :]
        return scan_layers(self.layers, lambda layer, h, _: (layer(h, keys), None), x)[0]
