"""Perceiver Resampler: any number of frames and grid cells in, a fixed number of visual tokens
out (paper A.1.1).
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from flamingo_jax.experiment import ResamplerConfig
from flamingo_jax.models.attention import attend
from flamingo_jax.models.layers import (
    FeedForward,
    LayerNorm,
    fan_in_normal,
    finite,
    kept,
    linear,
    scan_layers,
    spread,
    stack,
)

Array = jax.Array


class ResamplerLayer(nnx.Module):
    """x += Attn(q = x, kv = [features, x]); x += FFW(x). The features are the same at every
    layer (paper A.1.1).

    The paper does not place the resampler's norms: separate ones for features and latents
    before keys and values, one before the feed-forward, as public re-implementations have them.
    """

    def __init__(self, config: ResamplerConfig, *, rngs: nnx.Rngs):
        shape = (config.width, config.heads, config.head_width)
        self.feature_norm = LayerNorm(config.width)
        self.latent_norm = LayerNorm(config.width)
        self.query = fan_in_normal(rngs, shape)
        self.key = fan_in_normal(rngs, shape)
        self.value = fan_in_normal(rngs, shape)
        self.out = fan_in_normal(
            rngs,
            (config.heads, config.head_width, config.width),
            config.heads * config.head_width,
        )
        self.feed_forward_norm = LayerNorm(config.width)
        self.feed_forward = FeedForward(
            config.width, config.feed_forward, "squared_relu", rngs=rngs
        )

    def __call__(self, x: Array, features: Array, mask: Array) -> Array:
        """x [M, R, D], features [M, S, D], mask bool [M, 1, 1, S + R] -> [M, R, D]."""
        latents = self.latent_norm(x)
        media = jnp.concatenate([self.feature_norm(features), latents], axis=1)
        query, key, value = (
            kept(linear(latents, self.query[...])),
            kept(linear(media, self.key[...])),
            kept(linear(media, self.value[...])),
        )
        h = attend(query, key, value, mask)
        x = x + linear(h, self.out[...], 2)
        return x + self.feed_forward(self.feed_forward_norm(x))


class PerceiverResampler(nnx.Module):
    """Learned latents read a visual's features.

    A linear map brings the encoder's width to the resampler's (facts: 193.7 M with it).
    """

    def __init__(
        self, config: ResamplerConfig, feature_width: int, *, rngs: nnx.Rngs, remat: str = "none"
    ):
        self.config = config
        self.remat = remat
        self.input_projection = fan_in_normal(rngs, (feature_width, config.width))
        # Larger than the features they are added to: where small, a short training does not
        # tell the frames of a clip apart. Much larger, and above all much larger for places
        # than for times, and the direction of a motion is learned late.
        self.time_embedding = nnx.Param(
            1.5 * jax.random.normal(rngs.params(), (config.frames, config.width))
        )
        # A cell's place is its row's code plus its column's: 2 n codes for n x n cells, in
        # which all that lies left of a thing is alike. Larger than the features: only then do
        # the latents soon look at one place each, and tell what is left of what.
        codes = (2, config.position_grid, config.width)
        self.position_embedding = (
            nnx.Param(2.0 / math.sqrt(2) * jax.random.normal(rngs.params(), codes))
            if config.position_grid
            else None
        )
        self.latents = nnx.Param(jax.random.normal(rngs.params(), (config.latents, config.width)))
        self.layers = stack(lambda r: ResamplerLayer(config, rngs=r), config.layers, rngs)
        self.final_norm = LayerNorm(config.width)

    def time_embeddings(self, frames: int) -> Array:
        """float32 [frames, D]: the first ones, or the trained ones stretched linearly over more
        frames than were trained.
        """
        trained = self.config.frames
        if frames <= trained:
            return self.time_embedding[...][:frames]
        places = jnp.linspace(0.0, trained - 1, frames)
        low = jnp.clip(jnp.floor(places).astype(jnp.int32), 0, max(trained - 2, 0))
        high = jnp.minimum(low + 1, trained - 1)
        share = (places - low)[:, None]
        table = self.time_embedding[...]
        return table[low] * (1 - share) + table[high] * share

    def position_embeddings(self, cells: int) -> Array | None:
        """float32 [cells, D] for the cells of a square grid, row by row; None where the
        resampler has none.
        """
        if self.position_embedding is None:
            return None
        side = math.isqrt(cells)
        codes = self.position_embedding[...]
        if codes.shape[1] != side:
            codes = jax.image.resize(codes, (2, side, codes.shape[-1]), "linear")
        rows, columns = codes
        return (rows[:, None] + columns[None, :]).reshape(cells, -1)

    def __call__(self, features: Array, frame_mask: Array) -> Array:
        """features [M, T, S, C] (S grid cells a frame), frame_mask bool [M, T] -> visual tokens
        [M, R, D].

        Those of a visual with a feature that is not finite are NaN, and nothing else is, nor is
        a gradient.
        """
        visuals, frames, cells, _ = features.shape
        # What is masked, or broken, is not multiplied: not with a zero of the softmax, nor with
        # one of a gradient.
        features = jnp.where(frame_mask[:, :, None, None], features, jnp.zeros((), features.dtype))
        features, broken = finite(features, (1, 2, 3))
        x = linear(features, self.input_projection[...])
        x = x + spread(self.time_embeddings(frames)[:, None], x)
        positions = self.position_embeddings(cells)
        if positions is not None:
            x = x + spread(positions, x)
        x = x.reshape(visuals, frames * cells, -1)
        latents = jnp.broadcast_to(self.latents[...], (visuals, *self.latents.shape)).astype(
            x.dtype
        )
        keys = jnp.concatenate(
            [
                jnp.repeat(frame_mask, cells, axis=1),
                jnp.ones((visuals, self.config.latents), bool),
            ],
            axis=1,
        )
        mask = keys[:, None, None, :]
        latents, _ = scan_layers(
            self.layers,
            lambda layer, h, _: (layer(h, x, mask), None),
            latents,
            None,
            self.remat,
        )
        return jnp.where(broken[:, None, None], jnp.nan, self.final_norm(latents))
