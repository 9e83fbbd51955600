"""The contrastive model: vision encoder and text encoder into one joint space (paper B.1.3)."""

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
    """Both sides are mean-pooled, projected and normalised to length 1; their products are
    scaled by a learned inverse temperature.
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
        """uint8 [B, H, W, 3] -> float32 [B, J] of length 1."""
        vision = self.config.vision
        features = self.vision(
            normalise(images, vision.mean, vision.std, self.dtype), train=train, key=key
        )
        return _unit(linear(features.mean((1, 2)), self.vision_projection))

    def encode_texts(self, tokens: Array, mask: Array) -> Array:
        """int32 [B, L], bool [B, L] -> float32 [B, J] of length 1; the mean is over real
        tokens.
        """
        real = mask[..., None]
        total = jnp.where(real, self.text(tokens, mask), jnp.zeros((), self.dtype)).sum(1)
        pooled = total / jnp.maximum(real.sum(1), 1).astype(self.dtype)
        return _unit(linear(pooled, self.text_projection))


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
