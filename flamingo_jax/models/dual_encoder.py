"""The contrastive model (as CLIP): a vision encoder and a text encoder that map to one
embedding space, from which Flamingo's vision encoder comes (paper B.1.3).
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from flamingo_jax.experiment import ContrastiveConfig
from flamingo_jax.models.layers import fan_in_normal, linear
from flamingo_jax.models.text_encoder import TextEncoder
from flamingo_jax.models.vision import vision_encoder
from flamingo_jax.processing.normalise import normalise

Array = jax.Array


class DualEncoder(nnx.Module):
    """Embeds images and texts in one space of J dimensions.

    Features of either side are mean-pooled, projected and normalised to length 1. The loss
    scales their products by the learned inverse temperature, exp(log_inverse_temperature).
    """

    def __init__(
        self, config: ContrastiveConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
    ):
        self.config = config
        self.dtype = dtype
        self.vision = vision_encoder(config.vision, rngs=rngs)
        self.text = TextEncoder(config.text, rngs=rngs, dtype=dtype)
        self.vision_projection = fan_in_normal(rngs, (self.vision.width, config.joint_width))
        self.text_projection = fan_in_normal(rngs, (config.text.width, config.joint_width))
        self.log_inverse_temperature = nnx.Param(jnp.asarray(-math.log(config.initial_temperature)))

    def encode_images(
        self, images: Array, *, train: bool = False, key: Array | None = None
    ) -> Array:
        """Embeds images uint8 [B, H, W, 3] -> float32 [B, J] of length 1. key: randomness of
        stochastic depth in training.
        """
        vision = self.config.vision
        features = self.vision(
            normalise(images, vision.mean, vision.std, self.dtype), train=train, key=key
        )
        return _unit(linear(features.mean((1, 2)), self.vision_projection))

    def encode_texts(self, tokens: Array, mask: Array) -> Array:
        """Embeds texts, tokens int32 [B, L] and mask bool [B, L] (True for real tokens) ->
        float32 [B, J] of length 1; the mean is over real tokens.
        """
        real = mask[..., None]
        total = jnp.where(real, self.text(tokens, mask), jnp.zeros((), self.dtype)).sum(1)
        pooled = total / jnp.maximum(real.sum(1), 1).astype(self.dtype)
        return _unit(linear(pooled, self.text_projection))


def _unit(x: Array) -> Array:
    """Normalises the last axis to length 1, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
