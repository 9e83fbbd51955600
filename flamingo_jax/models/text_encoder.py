"""The contrastive model's text encoder, as BERT (Devlin et al. 2019): bidirectional, learned
positions, post-norm, GELU, biases everywhere.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from flamingo_jax.experiment import TextEncoderConfig
from flamingo_jax.models.attention import FullAttention
from flamingo_jax.models.layers import FeedForward, LayerNorm, scan_layers, stack

Array = jax.Array


class EncoderLayer(nnx.Module):
    """A post-norm layer: x = Norm(x + Attention(x)); x = Norm(x + FeedForward(x))."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        self.attention = FullAttention(config.width, config.heads, rngs=rngs)
        self.attention_norm = LayerNorm(config.width, 1e-12)
        self.feed_forward = FeedForward(
            config.width, 4 * config.width, "gelu", bias=True, rngs=rngs
        )
        self.feed_forward_norm = LayerNorm(config.width, 1e-12)

    def __call__(self, x: Array, mask: Array) -> Array:
        """Runs the layer: x [B, L, W], mask bool [B, 1, 1, L] -> [B, L, W]."""
        x = self.attention_norm(x + self.attention(x, mask))
        return self.feed_forward_norm(x + self.feed_forward(x))


class TextEncoder(nnx.Module):
    """Encodes tokens to a vector for each."""

    def __init__(
        self, config: TextEncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
    ):
        self.dtype = dtype
        self.embedding = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.width))
        )
        self.position_embedding = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (config.max_length, config.width))
        )
        self.embedding_norm = LayerNorm(config.width, 1e-12)
        self.layers = stack(lambda r: EncoderLayer(config, rngs=r), config.layers, rngs)

    def __call__(self, tokens: Array, mask: Array) -> Array:
        """Encodes tokens int32 [B, L] with mask bool [B, L], True for real tokens ->
        [B, L, W].
        """
        x = self.embedding[...][tokens] + self.position_embedding[...][: tokens.shape[1]]
        x = self.embedding_norm(x.astype(self.dtype))
        keys = mask[:, None, None, :]
        return scan_layers(self.layers, lambda layer, h, _: (layer(h, keys), None), x)[0]
