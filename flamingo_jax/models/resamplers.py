"""How any number of frames and grid cells becomes a fixed number of visual tokens: the paper's
Perceiver Resampler (A.1.1), and the two that its ablation compares it with (3.3).

All three are `Resampler`s: features [M, T, S, C] and a frame mask [M, T] -> [M, R, D].
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from flamingo_jax.experiment import ResamplerConfig
from flamingo_jax.models.attention import attend
from flamingo_jax.models.layers import (
    FeedForward,
    LayerNorm,
    broadcast_param,
    fan_in_normal,
    linear,
    save_for_backward,
    scan_layers,
    stack,
    zero_nonfinite,
)

Array = jax.Array


class PerceiverLayer(nnx.Module):
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
            save_for_backward(linear(latents, self.query[...])),
            save_for_backward(linear(media, self.key[...])),
            save_for_backward(linear(media, self.value[...])),
        )
        h = attend(query, key, value, mask)
        x = x + linear(h, self.out[...], 2)
        return x + self.feed_forward(self.feed_forward_norm(x))


class TransformerLayer(nnx.Module):
    """x += Attn(Norm(x)); x += FFW(Norm(x)): a layer that updates features and latents alike."""

    def __init__(self, config: ResamplerConfig, *, rngs: nnx.Rngs):
        shape = (config.width, config.heads, config.head_width)
        self.attention_norm = LayerNorm(config.width)
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

    def __call__(self, x: Array, mask: Array) -> Array:
        """x [M, S + R, D], mask bool [M, 1, 1, S + R] -> [M, S + R, D]."""
        h = self.attention_norm(x)
        query, key, value = (
            save_for_backward(linear(h, self.query[...])),
            save_for_backward(linear(h, self.key[...])),
            save_for_backward(linear(h, self.value[...])),
        )
        x = x + linear(attend(query, key, value, mask), self.out[...], 2)
        return x + self.feed_forward(self.feed_forward_norm(x))


class MLPLayer(nnx.Module):
    """x += FFW(Norm(x)): a layer in which no cell sees another."""

    def __init__(self, config: ResamplerConfig, *, rngs: nnx.Rngs):
        self.feed_forward_norm = LayerNorm(config.width)
        self.feed_forward = FeedForward(
            config.width, config.feed_forward, "squared_relu", rngs=rngs
        )

    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        return x + self.feed_forward(self.feed_forward_norm(x))


class Resampler(nnx.Module):
    """What the three share: features brought to the resampler's width, the embeddings of their
    time and place, and the norm of the tokens that come out.

    A linear map brings the encoder's width to the resampler's (the paper's 194 M parameters are
    with one).
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
        """Computes a visual's tokens from the encoder's features.

        Those of a visual with a feature that is not finite are NaN, and nothing else is, nor is
        a gradient.

        Args:
          features: [M, T, S, C], S grid cells a frame.
          frame_mask: bool [M, T], True where there is a frame.

        Returns: [M, R, D].
        """
        visuals, frames, cells, _ = features.shape
        # What is masked, or broken, is not multiplied: not with a zero of the softmax, nor with
        # one of a gradient.
        features = jnp.where(frame_mask[:, :, None, None], features, jnp.zeros((), features.dtype))
        features, broken = zero_nonfinite(features, (1, 2, 3))
        x = linear(features, self.input_projection[...])
        x = x + broadcast_param(self.time_embeddings(frames)[:, None], x)
        positions = self.position_embeddings(cells)
        if positions is not None:
            x = x + broadcast_param(positions, x)
        tokens = self.final_norm(self.reduce(x, frame_mask))
        return jnp.where(broken[:, None, None], jnp.nan, tokens)

    def reduce(self, x: Array, frame_mask: Array) -> Array:
        """Embedded features [M, T, S, D], all finite -> [M, R, D] before the final norm."""
        raise NotImplementedError


def _key_mask(frame_mask: Array, cells: int, latents: int) -> Array:
    """bool [M, T] -> [M, 1, 1, T * cells + latents]: the cells of real frames, and all latents."""
    keys = [
        jnp.repeat(frame_mask, cells, axis=1),
        jnp.ones((frame_mask.shape[0], latents), bool),
    ]
    return jnp.concatenate(keys, axis=1)[:, None, None, :]


class PerceiverResampler(Resampler):
    """Learned latents read the features, which no layer changes (paper A.1.1)."""

    def __init__(
        self, config: ResamplerConfig, feature_width: int, *, rngs: nnx.Rngs, remat: str = "none"
    ):
        super().__init__(config, feature_width, rngs=rngs, remat=remat)
        self.latents = nnx.Param(jax.random.normal(rngs.params(), (config.latents, config.width)))
        self.layers = stack(lambda r: PerceiverLayer(config, rngs=r), config.layers, rngs)

    def reduce(self, x: Array, frame_mask: Array) -> Array:
        visuals, frames, cells, width = x.shape
        x = x.reshape(visuals, frames * cells, width)
        latents = jnp.broadcast_to(self.latents[...], (visuals, *self.latents.shape)).astype(
            x.dtype
        )
        mask = _key_mask(frame_mask, cells, self.config.latents)
        return scan_layers(
            self.layers,
            lambda layer, h, _: (layer(h, x, mask), None),
            latents,
            None,
            self.remat,
        )[0]


class TransformerResampler(Resampler):
    """Features and learned latents are one sequence of a plain Transformer; the latents' last
    states are the tokens.

    Its layers have the Perceiver's parameters but one norm, so that both have the same size, as
    in the paper's ablation; it computes the features anew at every layer besides.
    """

    def __init__(
        self, config: ResamplerConfig, feature_width: int, *, rngs: nnx.Rngs, remat: str = "none"
    ):
        super().__init__(config, feature_width, rngs=rngs, remat=remat)
        self.latents = nnx.Param(jax.random.normal(rngs.params(), (config.latents, config.width)))
        self.layers = stack(lambda r: TransformerLayer(config, rngs=r), config.layers, rngs)

    def reduce(self, x: Array, frame_mask: Array) -> Array:
        visuals, frames, cells, width = x.shape
        latents = jnp.broadcast_to(self.latents[...], (visuals, *self.latents.shape)).astype(
            x.dtype
        )
        x = jnp.concatenate([x.reshape(visuals, frames * cells, width), latents], axis=1)
        mask = _key_mask(frame_mask, cells, self.config.latents)
        x, _ = scan_layers(
            self.layers, lambda layer, h, _: (layer(h, mask), None), x, None, self.remat
        )
        return x[:, frames * cells :]


class MLPResampler(Resampler):
    """A multilayer perceptron on every cell, the mean over frames, and a learned map from the
    grid's cells to the tokens.

    The paper says no more than "MLP". The mean is taken behind the layers, where the order of
    frames is already in the features; the map belongs to a square grid and is stretched
    linearly over the grids of other image sizes.
    """

    def __init__(
        self,
        config: ResamplerConfig,
        feature_width: int,
        grid: int,
        *,
        rngs: nnx.Rngs,
        remat: str = "none",
    ):
        super().__init__(config, feature_width, rngs=rngs, remat=remat)
        self.layers = stack(lambda r: MLPLayer(config, rngs=r), config.layers, rngs)
        self.cells_to_tokens = fan_in_normal(rngs, (grid * grid, config.latents))

    def reduce(self, x: Array, frame_mask: Array) -> Array:
        x, _ = scan_layers(self.layers, lambda layer, h, _: (layer(h), None), x, None, self.remat)
        real = frame_mask[:, :, None, None]
        count = jnp.maximum(frame_mask.sum(1), 1)[:, None, None].astype(x.dtype)
        mean = jnp.where(real, x, jnp.zeros((), x.dtype)).sum(1) / count
        return linear(mean.swapaxes(1, 2), self._map(mean.shape[1])).swapaxes(1, 2)

    def _map(self, cells: int) -> Array:
        """[cells, R]: the learned map, stretched where the grid is not the trained one; the sum
        over cells then stays as large as it was.
        """
        table = self.cells_to_tokens[...]
        if cells == table.shape[0]:
            return table
        trained, side = math.isqrt(table.shape[0]), math.isqrt(cells)
        stretched = jax.image.resize(
            table.reshape(trained, trained, -1), (side, side, table.shape[1]), "linear"
        )
        return stretched.reshape(cells, -1) * (table.shape[0] / cells)


def make_resampler(
    config: ResamplerConfig,
    feature_width: int,
    grid: int,
    *,
    rngs: nnx.Rngs,
    remat: str = "none",
) -> Resampler:
    """Makes the resampler that `config.kind` names.

    Args:
      feature_width: C of the encoder's features.
      grid: rows, and columns, of the encoder's grid at its own image size; only `mlp` has
        parameters for each cell.
      remat: what is computed again for the gradient (see `layers.remat`).
    """
    if config.kind == "mlp":
        return MLPResampler(config, feature_width, grid, rngs=rngs, remat=remat)
    kinds: dict[str, Callable[..., Resampler]] = {
        "perceiver": PerceiverResampler,
        "transformer": TransformerResampler,
    }
    return kinds[config.kind](config, feature_width, rngs=rngs, remat=remat)
