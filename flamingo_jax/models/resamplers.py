"""Resamplers: reduce any number of frames and grid cells to a fixed number of visual tokens.
The paper's Perceiver Resampler (A.1.1), and the two that its ablation compares it with (3.3).

All three are `Resampler`s: features [M, T, S, C] and a frame mask [M, T] -> [M, R, D], for M
visuals, T frames, S grid cells, R visual tokens (`config.latents`), D the resampler's width.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from flamingo_jax.experiment import ResamplerConfig
from flamingo_jax.models.attention import attend, mean_weights
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
from flamingo_jax.partitioning.constraints import constrain
from flamingo_jax.partitioning.mesh import ROWS

Array = jax.Array


class AttentionLayer(nnx.Module):
    """The attention weights and the feed-forward that Perceiver and Transformer layers share;
    each has norms of its own before the attention.
    """

    def __init__(self, config: ResamplerConfig, *, rngs: nnx.Rngs):
        shape = (config.width, config.heads, config.head_width)
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

    def update(self, x: Array, queries: Array, media: Array, mask: Array) -> Array:
        """Updates x [M, Q, D] by attention of `queries` [M, Q, D] to `media` [M, S, D], both
        normalised, and by the feed-forward -> [M, Q, D]. mask: bool [M, 1, 1, S].
        """
        # Stated here and at every sum: the compiler would otherwise lay the latents, which are
        # the same for all visuals, out by their width, and gather all visuals on every device.
        queries, media = constrain(queries, ROWS), constrain(media, ROWS)
        query, key, value = (
            save_for_backward(linear(queries, self.query[...])),
            save_for_backward(linear(media, self.key[...])),
            save_for_backward(linear(media, self.value[...])),
        )
        h = attend(query, key, value, mask)  # [M, Q, H, d]
        x = constrain(x + linear(h, self.out[...], 2), ROWS)
        return constrain(x + self.feed_forward(self.feed_forward_norm(x)), ROWS)

    def weights(self, queries: Array, media: Array, mask: Array) -> Array:
        """Computes the attention weights of `update`, averaged over heads: float32 [M, Q, S]."""
        query, key = linear(queries, self.query[...]), linear(media, self.key[...])
        return mean_weights(query, key, mask)


class PerceiverLayer(AttentionLayer):
    """Updates latents x by attention to the features and themselves: x += Attn(q = x, kv =
    [features, x]); x += FFW(x). Every layer gets the same features (paper A.1.1).

    The paper does not say where the norms are. As in public re-implementations, features and
    latents have a norm each before keys and values, and the feed-forward has one.
    """

    def __init__(self, config: ResamplerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.feature_norm = LayerNorm(config.width)
        self.latent_norm = LayerNorm(config.width)

    def __call__(self, x: Array, features: Array, mask: Array) -> Array:
        """Updates latents x [M, R, D] from features [M, S, D] -> [M, R, D]; here S counts the
        cells of all frames. mask: bool [M, 1, 1, S + R].
        """
        return self.update(x, *self.normalised(x, features), mask)

    def normalised(self, x: Array, features: Array) -> tuple[Array, Array]:
        """Returns the queries [M, R, D], and what they attend to [M, S + R, D]."""
        latents = self.latent_norm(x)
        # [M, S, D] and [M, R, D] -> [M, S + R, D]
        return latents, jnp.concatenate([self.feature_norm(features), latents], axis=1)


class TransformerLayer(AttentionLayer):
    """A pre-norm Transformer layer over features and latents together: x += Attn(Norm(x));
    x += FFW(Norm(x)).
    """

    def __init__(self, config: ResamplerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.attention_norm = LayerNorm(config.width)

    def __call__(self, x: Array, mask: Array) -> Array:
        """Updates x [M, S + R, D] -> [M, S + R, D]. mask: bool [M, 1, 1, S + R]."""
        h = self.attention_norm(x)
        return self.update(x, h, h, mask)


class MLPLayer(nnx.Module):
    """A residual feed-forward layer, x += FFW(Norm(x)), applied to each grid cell alone."""

    def __init__(self, config: ResamplerConfig, *, rngs: nnx.Rngs):
        self.feed_forward_norm = LayerNorm(config.width)
        self.feed_forward = FeedForward(
            config.width, config.feed_forward, "squared_relu", rngs=rngs
        )

    def __call__(self, x: Array) -> Array:
        """Updates x [..., D] -> [..., D]."""
        return x + self.feed_forward(self.feed_forward_norm(x))


class Resampler(nnx.Module):
    """The parts that all three kinds share: a projection of the features to the resampler's
    width, time and position embeddings, and a final norm. A kind implements `reduce`.

    The paper does not mention the projection, but its 194 M parameters include one.
    """

    def __init__(
        self, config: ResamplerConfig, feature_width: int, *, rngs: nnx.Rngs, remat: str = "none"
    ):
        self.config = config
        self.remat = remat
        self.input_projection = fan_in_normal(rngs, (feature_width, config.width))
        # Initialised larger than the features they are added to: with small embeddings a short
        # training does not learn to tell a clip's frames apart. With much larger ones, above
        # all if position embeddings are much larger than time embeddings, the direction of a
        # motion is learned late.
        self.time_embedding = nnx.Param(
            1.5 * jax.random.normal(rngs.params(), (config.frames, config.width))
        )
        # A cell's embedding is its row's plus its column's: 2 n vectors for n x n cells, so
        # that cells in one column share a component and "left of" is easy to learn.
        # Initialised larger than the features: only then do latents soon attend to single
        # places, and spatial relations are learned.
        codes = (2, config.position_grid, config.width)
        self.position_embedding = (
            nnx.Param(2.0 / math.sqrt(2) * jax.random.normal(rngs.params(), codes))
            if config.position_grid
            else None
        )
        self.final_norm = LayerNorm(config.width)

    def time_embeddings(self, frames: int) -> Array:
        """Returns the time embeddings float32 [frames, D]: the first `frames` of them, or for
        more frames than were trained a linear interpolation (in the paper 8 frames in
        training, 30 at inference).
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
        """Returns the position embeddings float32 [cells, D] of a square grid, row by row,
        interpolated where the grid has another size than the trained one; None where the
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
        """Computes visual tokens from the encoder's features.

        The tokens of a visual with a NaN or infinite feature are NaN; those of other visuals,
        and all gradients, stay finite.

        Args:
          features: [M, T, S, C], S grid cells a frame.
          frame_mask: bool [M, T], True where there is a frame.

        Returns: [M, R, D].
        """
        x, broken = self._embedded(features, frame_mask)
        tokens = self.final_norm(self.reduce(x, frame_mask))
        return jnp.where(broken[:, None, None], jnp.nan, tokens)

    def reduce(self, x: Array, frame_mask: Array) -> Array:
        """Reduces embedded features [M, T, S, D], all finite -> [M, R, D], before the final
        norm.
        """
        raise NotImplementedError

    def rollout(self, features: Array, frame_mask: Array) -> Array:
        """Computes which grid cells each visual token comes from: float32 [M, R, T, S], over
        all frames and cells summing to 1. For looking at a model.

        For layers of attention it is the attention rollout (Abnar and Zuidema 2020): weights
        are averaged over heads, the residual stream counts as half of a layer's output, and
        what comes from the learned latents is left out.

        Args: as for `__call__`.
        """
        visuals, frames, cells, _ = features.shape
        x, _ = self._embedded(features, frame_mask)
        shares = self.shares(x, frame_mask).reshape(visuals, -1, frames, cells)
        return shares / jnp.maximum(shares.sum((2, 3), keepdims=True), 1e-30)

    def shares(self, x: Array, frame_mask: Array) -> Array:
        """Computes `rollout` of embedded features [M, T, S, D] before it is normalised:
        float32 [M, R, T * S].
        """
        raise NotImplementedError

    def _embedded(self, features: Array, frame_mask: Array) -> tuple[Array, Array]:
        """Projects features [M, T, S, C] and adds time and position embeddings -> [M, T, S, D],
        and which visuals are not finite, bool [M].
        """
        _, frames, cells, _ = features.shape
        # Masked and broken features are zeroed before any product: a zero weight of the
        # softmax, or a zero gradient, times NaN would be NaN.
        features = jnp.where(frame_mask[:, :, None, None], features, jnp.zeros((), features.dtype))
        features, broken = zero_nonfinite(features, (1, 2, 3))
        x = linear(features, self.input_projection[...])  # [M, T, S, D]
        x = x + broadcast_param(self.time_embeddings(frames)[:, None], x)
        positions = self.position_embeddings(cells)
        if positions is not None:
            x = x + broadcast_param(positions, x)
        return x, broken


def _key_mask(frame_mask: Array, cells: int, latents: int) -> Array:
    """Makes the attention mask over [features, latents], True for cells of real frames and all
    latents: frame mask bool [M, T] -> [M, 1, 1, T * cells + latents].
    """
    keys = [
        jnp.repeat(frame_mask, cells, axis=1),
        jnp.ones((frame_mask.shape[0], latents), bool),
    ]
    return jnp.concatenate(keys, axis=1)[:, None, None, :]


def _repeated(latents: nnx.Param, visuals: int, dtype: DTypeLike) -> Array:
    """Repeats the learned latents [R, D] for every visual -> [M, R, D]."""
    return jnp.broadcast_to(latents[...], (visuals, *latents.shape)).astype(dtype)


class PerceiverResampler(Resampler):
    """The paper's resampler: learned latents cross-attend to the features, which stay the same
    at every layer (A.1.1).
    """

    def __init__(
        self, config: ResamplerConfig, feature_width: int, *, rngs: nnx.Rngs, remat: str = "none"
    ):
        super().__init__(config, feature_width, rngs=rngs, remat=remat)
        self.latents = nnx.Param(jax.random.normal(rngs.params(), (config.latents, config.width)))
        self.layers = stack(lambda r: PerceiverLayer(config, rngs=r), config.layers, rngs)

    def reduce(self, x: Array, frame_mask: Array) -> Array:
        x, latents, mask = self._sequence(x, frame_mask)
        return scan_layers(
            self.layers,
            lambda layer, h, _: (layer(h, x, mask), None),
            latents,
            None,
            self.remat,
        )[0]

    def shares(self, x: Array, frame_mask: Array) -> Array:
        x, latents, mask = self._sequence(x, frame_mask)
        cells = x.shape[1]

        def step(layer: PerceiverLayer, carry: Any, _: None) -> tuple[Any, None]:
            h, found = carry
            weights = layer.weights(*layer.normalised(h, x), mask)  # [M, R, T * S + R]
            found = found + weights[..., :cells] + weights[..., cells:] @ found
            return (layer(h, x, mask), found / 2), None

        nothing = jnp.zeros((*latents.shape[:2], cells))
        return scan_layers(self.layers, step, (latents, nothing))[0][1]

    def _sequence(self, x: Array, frame_mask: Array) -> tuple[Array, Array, Array]:
        """Returns the grid cells of all frames as one sequence of keys [M, T * S, D], the
        latents [M, R, D] and the mask over both.
        """
        visuals, frames, cells, width = x.shape
        x = x.reshape(visuals, frames * cells, width)
        latents = constrain(_repeated(self.latents, visuals, x.dtype), ROWS)
        return x, latents, _key_mask(frame_mask, cells, self.config.latents)


class TransformerResampler(Resampler):
    """A plain Transformer over the sequence of features and learned latents; the latents' last
    states are the visual tokens.

    Its layers have the Perceiver layers' parameters less one norm, so that both resamplers
    have the same size, as in the paper's ablation. It costs more, since every layer updates
    the features too.
    """

    def __init__(
        self, config: ResamplerConfig, feature_width: int, *, rngs: nnx.Rngs, remat: str = "none"
    ):
        super().__init__(config, feature_width, rngs=rngs, remat=remat)
        self.latents = nnx.Param(jax.random.normal(rngs.params(), (config.latents, config.width)))
        self.layers = stack(lambda r: TransformerLayer(config, rngs=r), config.layers, rngs)

    def reduce(self, x: Array, frame_mask: Array) -> Array:
        x, mask = self._sequence(x, frame_mask)
        x, _ = scan_layers(
            self.layers, lambda layer, h, _: (layer(h, mask), None), x, None, self.remat
        )
        return x[:, -self.config.latents :]

    def shares(self, x: Array, frame_mask: Array) -> Array:
        x, mask = self._sequence(x, frame_mask)
        cells = x.shape[1] - self.config.latents

        def step(layer: TransformerLayer, carry: Any, _: None) -> tuple[Any, None]:
            h, found = carry
            normalised = layer.attention_norm(h)
            found = found + layer.weights(normalised, normalised, mask) @ found
            return (layer(h, mask), found / 2), None

        # At first a cell is its own source, and a latent has none: [M, T * S + R, T * S].
        own = jnp.eye(x.shape[1], cells)
        start = jnp.broadcast_to(own, (x.shape[0], *own.shape))
        return scan_layers(self.layers, step, (x, start))[0][1][:, cells:]

    def _sequence(self, x: Array, frame_mask: Array) -> tuple[Array, Array]:
        """Returns the sequence of cells and latents [M, T * S + R, D], and its mask."""
        visuals, frames, cells, width = x.shape
        latents = _repeated(self.latents, visuals, x.dtype)
        x = jnp.concatenate([x.reshape(visuals, frames * cells, width), latents], axis=1)
        return constrain(x, ROWS), _key_mask(frame_mask, cells, self.config.latents)


class MLPResampler(Resampler):
    """An MLP on every grid cell, the mean over frames, and a learned linear map from the
    grid's cells to the visual tokens.

    The paper only says "MLP". The mean comes after the layers, which have seen the time
    embeddings, so that the order of frames is not lost. The map is learned for one square grid
    and interpolated linearly for images of other sizes.
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
        # The mean over real frames: [M, T, S, D] -> [M, S, D]
        real = frame_mask[:, :, None, None]
        count = jnp.maximum(frame_mask.sum(1), 1)[:, None, None].astype(x.dtype)
        mean = jnp.where(real, x, jnp.zeros((), x.dtype)).sum(1) / count
        # [M, D, S] x [S, R] -> [M, D, R] -> [M, R, D]
        return linear(mean.swapaxes(1, 2), self._map(mean.shape[1])).swapaxes(1, 2)

    def shares(self, x: Array, frame_mask: Array) -> Array:
        """Takes the sizes of the learned map's entries, the same for every real frame: this
        kind has no attention.
        """
        sizes = jnp.abs(self._map(x.shape[2])).T.astype(jnp.float32)  # [R, S]
        shares = sizes[None, :, None] * frame_mask[:, None, :, None]
        return shares.reshape(*shares.shape[:2], -1)

    def _map(self, cells: int) -> Array:
        """Returns the learned map [cells, R], interpolated where the grid is not the trained
        one, and rescaled so that the sum over cells keeps its size.
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
      remat: what the backward pass recomputes (see `layers.remat`).
    """
    if config.kind == "mlp":
        return MLPResampler(config, feature_width, grid, rngs=rngs, remat=remat)
    kinds: dict[str, Callable[..., Resampler]] = {
        "perceiver": PerceiverResampler,
        "transformer": TransformerResampler,
    }
    return kinds[config.kind](config, feature_width, rngs=rngs, remat=remat)
