"""Conditioning: how the frozen language model comes to see (paper 2.2, figure 4; ablated in 3.3).

Cross-attention blocks read the visual tokens, and the config's `kind` says where they stand:
before layers of the language model (`gated_xattn_dense`, the paper's choice), within its layers
(`vanilla_xattn`), or behind all of them, between layers of their own (`grafting`). What a block
knows of a visual is computed once per visual (`project_visuals`); `attend` is what it does to
the text. Training, evaluation and decoding run the same blocks by `ConditionedLayers`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import ConditioningConfig, LanguageModelConfig
from flamingo_jax.models import ops
from flamingo_jax.models.attention import Cache, attend, map_cache
from flamingo_jax.models.decoder import DecoderLayer
from flamingo_jax.models.layers import (
    FeedForward,
    LayerNorm,
    broadcast_param,
    fan_in_normal,
    gated_linear,
    linear,
    remat,
    save_for_backward,
    stack,
)
from flamingo_jax.models.packing import MediaView, Packing
from flamingo_jax.partitioning.constraints import all_gather, reduce_scatter, residual

Array = jax.Array
Between = Callable[[Array], Array]
"""What is done to the text between a decoder layer's attention and its feed-forward."""


class Media(NamedTuple):
    """A block's keys and values: of M visuals with R tokens each [M, R, H, d]; of text as its
    stream lies.
    """

    key: Array
    value: Array


def media_mask(
    media_index: Array,
    segments: Array | None,
    visuals: Array,
    tokens_per_visual: int,
    attend_to: str,
) -> Array:
    """Which visual tokens each text token sees: bool [B, 1, L, N * R].

    Args:
      media_index: int32 [B, L], phi: the place within the row's visuals, -1 for none.
      segments: int32 [B, L], or None where a row is one segment.
      visuals: int32 [B, N], -1 for an empty place.
      attend_to: "last" (paper): the visual phi alone; "all_previous": also those before it in
        the same segment.
    """
    places = jnp.arange(visuals.shape[1])
    mask = media_index[:, :, None] == places
    if attend_to == "all_previous":
        before = media_index[:, :, None] >= places
        if segments is not None:
            # A visual belongs to the segment of the tokens that look at it.
            owner = jnp.max(jnp.where(mask, segments[:, :, None], 0), axis=1)
            before = before & (owner[:, None, :] == segments[:, :, None])
        # Several segments may look at one visual, which then belongs to the last of them.
        mask = mask | before
    mask = mask & (visuals >= 0)[:, None, :]
    return jnp.repeat(mask, tokens_per_visual, axis=-1)[:, None]


class CrossAttentionBlock(nnx.Module):
    """y += tanh(a) * CrossAttn(LN(y), LN(X)); y += tanh(b) * FFW(LN(y)), with both gates 0 at
    the start (unless `config.gate_init`).

    `vanilla_xattn` has the first line alone; without gating both gates are 1 and no parameters.

    One LayerNorm serves keys and values (paper v1, 3.1.2); no part that follows the attention
    has a bias, so that a token with no visual gets exactly zero from it.
    """

    def __init__(self, config: ConditioningConfig, width: int, *, rngs: nnx.Rngs):
        shape = (width, config.heads, config.head_width)
        self.text_window = config.text_window
        self.attention_norm = LayerNorm(width)
        self.media_norm = LayerNorm(width)
        self.query = fan_in_normal(rngs, shape)
        self.key = fan_in_normal(rngs, shape)
        self.value = fan_in_normal(rngs, shape)
        self.out = fan_in_normal(
            rngs, (*shape[1:], width), config.heads * config.head_width, config.out_scale
        )
        self.attention_gate = make_gate(config)
        dense = config.kind != "vanilla_xattn"
        self.dense_norm = LayerNorm(width) if dense else None
        self.feed_forward = (
            FeedForward(width, config.feed_forward, "squared_relu", rngs=rngs) if dense else None
        )
        if self.feed_forward is not None:
            self.feed_forward.down[...] *= config.out_scale
        self.dense_gate = make_gate(config) if dense else None

    def project_visuals(self, visual_tokens: Array) -> Media:
        """[M, R, D] -> keys and values, once per visual however many rows look at it."""
        x = self.media_norm(visual_tokens)
        # One of the two: both together are the most memory for the least that is computed
        # again.
        return Media(save_for_backward(linear(x, self.key[...])), linear(x, self.value[...]))

    def project_text(self, y: Array) -> Media | None:
        """[S, T, D] -> keys and values of the text, [S, T, H, d]; None without `text_window`."""
        if not self.text_window:
            return None
        x = all_gather(self.attention_norm(y))
        return Media(save_for_backward(linear(x, self.key[...])), linear(x, self.value[...]))

    def attend(
        self, y: Array, media: Media | None, view: MediaView | None, text: Media | None = None
    ) -> Array:
        """The text's stream y [S, T, D] -> [S, T, D], each token having looked at those of
        `media`, and of `text` (see `project_text`), that `view` shows it; with neither there is
        nothing to see.
        """
        if media is not None:
            assert view is not None
            query = save_for_backward(linear(all_gather(self.attention_norm(y)), self.query[...]))
            h = view.over_rows(attend, query, media.key, media.value, text)
            y = save_for_backward(residual(y + reduce_scatter(self._gated_out(h))))
        if self.feed_forward is None or self.dense_norm is None:
            return y
        h = all_gather(self.dense_norm(y))
        return residual(y + reduce_scatter(self.feed_forward(h, _opened(self.dense_gate))))

    def _gated_out(self, h: Array) -> Array:
        """[..., H, d] -> [..., D], times the gate."""
        gate = _opened(self.attention_gate)
        weight = self.out[...]
        return linear(h, weight, 2) if gate is None else gated_linear(h, weight, gate, 2)


def make_gate(config: ConditioningConfig) -> nnx.Param | None:
    """Makes a scalar gate; None without gating."""
    return nnx.Param(jnp.full((), config.gate_init)) if config.gating == "tanh" else None


def _opened(gate: nnx.Param | None) -> Array | None:
    """What a gate lets through, in -1 .. 1; None for all."""
    return None if gate is None else jnp.tanh(gate[...])


class CrossAttentionBlocks(nnx.Module):
    """The stack of a model's cross-attention blocks."""

    def __init__(self, config: ConditioningConfig, lm: LanguageModelConfig, *, rngs: nnx.Rngs):
        self.layers = stack(
            lambda r: CrossAttentionBlock(config, lm.width, rngs=r), count_blocks(config, lm), rngs
        )


def count_blocks(config: ConditioningConfig, lm: LanguageModelConfig) -> int:
    """Counts the cross-attention blocks of a model.

    Raises: UserError where the config has no place for them, or says what its kind has not.
    """
    if config.gating == "none" and config.gate_init:
        raise UserError(
            f"conditioning.gate_init is {config.gate_init}, but gating 'none' has no gates: make"
            " it 0, or gating 'tanh'"
        )
    if config.kind == "grafting":
        return config.grafted_layers
    if config.xattn_first >= lm.layers:
        raise UserError(
            f"conditioning.xattn_first is {config.xattn_first}, but the language model has layers"
            f" 0 to {lm.layers - 1}: choose one of them"
        )
    if config.kind == "vanilla_xattn" and lm.residual != "sequential":
        raise UserError(
            "conditioning.kind 'vanilla_xattn' stands between a layer's attention and its"
            f" feed-forward, but this language model's run side by side (residual {lm.residual!r}):"
            " choose another kind"
        )
    return math.ceil((lm.layers - config.xattn_first) / config.xattn_every)


class GraftedLayer(DecoderLayer):
    """A decoder layer that is trained from scratch behind a frozen language model.

    With tanh gating x += tanh(gate) * (layer(x) - x), so that the language model's own outputs
    are what training begins with, as with the other kinds (the paper does not say how its
    grafted layers start).
    """

    def __init__(self, config: ConditioningConfig, lm: LanguageModelConfig, *, rngs: nnx.Rngs):
        super().__init__(lm, rngs=rngs)
        self.gate = make_gate(config)

    def __call__(
        self,
        x: Array,
        positions: Array,
        packing: Packing | None,
        cache: Cache | None,
        between: Between | None = None,
    ) -> tuple[Array, Cache | None]:
        y, cache = super().__call__(x, positions, packing, cache, between)
        if self.gate is None:
            return y, cache
        return x + broadcast_param(jnp.tanh(self.gate[...]), x) * (y - x), cache


class GraftedLayers(nnx.Module):
    """The stack of trained decoder layers of `grafting`."""

    def __init__(self, config: ConditioningConfig, lm: LanguageModelConfig, *, rngs: nnx.Rngs):
        self.layers = stack(lambda r: GraftedLayer(config, lm, rngs=r), config.grafted_layers, rngs)


class DecodingCache(NamedTuple):
    """What decoding keeps of the tokens so far. text: of the decoder layers, grafted ones last.
    windows: with `text_window`, the keys and values of the text that each block's tokens see
    beside a visual, [blocks, B, S, H, d], slot s holding the token at position s.
    """

    text: Cache
    windows: Media | None = None


class ConditionedLayers:
    """The language model's layers and the cross-attention blocks, in the order of their kind.

    The language model stays one flat stack that each step indexes, since the depth need not be
    a multiple of `xattn_every` (the 80B model's 80 layers are 11 groups of 7 and one of 3) and
    slicing a frozen stack would copy it.

    Args:
      layers: the language model's stack. blocks: the cross-attention blocks'. grafted: of the
        kind `grafting`, its decoder layers, as many as blocks.
      read_text: (decoder layer, x, its cache, between) -> x, its cache.
      read_visuals: (block, x, its media, its window) -> x, its window.
      remat_mode: what is computed again for the gradient (see `layers.remat`).
    """

    def __init__(
        self,
        config: ConditioningConfig,
        layers: nnx.Module,
        blocks: nnx.Module,
        grafted: nnx.Module | None,
        read_text: Callable[..., tuple[Array, Any]],
        read_visuals: Callable[..., tuple[Array, Any]],
        remat_mode: str,
    ):
        self.config = config
        self.read_text, self.read_visuals = read_text, read_visuals
        self.layers_graph, self.layers = nnx.split(layers)
        self.blocks_graph, self.blocks = nnx.split(blocks)
        self.grafted_graph: Any = None
        self.grafted: Any = None
        if grafted is not None:
            self.grafted_graph, self.grafted = nnx.split(grafted)
        self.depth = jax.tree.leaves(self.layers)[0].shape[0]
        self.count = jax.tree.leaves(self.blocks)[0].shape[0]
        self._run_layer = remat(self._layer, remat_mode)
        self._run_block = remat(self._block, remat_mode)
        self._run_grafted = remat(self._grafted, remat_mode)

    def __call__(
        self, x: Array, cache: DecodingCache | None, media: Any
    ) -> tuple[Array, DecodingCache | None]:
        """x [B, L, D]; media: what blocks read, leaves [blocks, ...], or None -> x and the cache
        with its tokens.
        """
        carry = (x, *(cache or (None, None)))
        given = (jnp.arange(self.count), self.blocks, media)
        if self.config.kind == "grafting":
            carry = self._plain(carry, 0, self.depth)
            carry, _ = jax.lax.scan(self._graft_step, carry, (self.grafted, *given))
        else:
            carry = self._interleaved(carry, given)
        x, *kept = carry
        return x, None if cache is None else DecodingCache(*kept)

    def _interleaved(self, carry: Any, given: Any) -> Any:
        """Groups of a block and `xattn_every` layers, behind those that have none."""
        first, every = self.config.xattn_first, self.config.xattn_every
        carry = self._plain(carry, 0, first)
        groups, rest = divmod(self.depth - first, every)
        if groups:
            starts = first + jnp.arange(groups) * every
            whole = jax.tree.map(lambda a: a[:groups], given) if rest else given
            group = functools.partial(self._group, count=every)
            unroll = ops.scan_unroll(groups)
            carry, _ = jax.lax.scan(group, carry, (starts, *whole), unroll=unroll)
        if not rest:
            return carry
        # The rest has code of its own: a condition in the loop would keep the largest arrays of
        # both its branches, and its weights, in memory.
        last = jax.tree.map(lambda a: a[groups], given)
        return self._group(carry, (jnp.int32(first + groups * every), *last), rest)[0]

    def _group(self, carry: Any, inputs: Any, count: int) -> tuple[Any, None]:
        """A block and `count` layers: the block before the first of them, or within it."""
        first, *conditioned = inputs
        if self.config.kind == "vanilla_xattn":
            carry, _ = self._step(carry, first, *conditioned)
            return self._plain(carry, first + 1, count - 1), None
        x, text, windows = carry
        x, windows = self._run_block(x, windows, *conditioned)
        return self._plain((x, text, windows), first, count), None

    def _plain(self, carry: Any, first: Any, count: int) -> Any:
        """`count` layers from `first` on, without a block."""
        if count <= 1:
            return self._step(carry, jnp.int32(first))[0] if count else carry
        places = first + jnp.arange(count)
        return jax.lax.scan(self._step, carry, places, unroll=ops.scan_unroll(count))[0]

    def _step(self, carry: Any, place: Array, *conditioned: Any) -> tuple[Any, None]:
        """One layer of the language model, with a block in it where there is one."""
        x, text, windows = carry
        x, new, windows = self._run_layer(x, _take(text, place), windows, place, *conditioned)
        return (x, _put(text, new, place), windows), None

    def _graft_step(self, carry: Any, inputs: Any) -> tuple[Any, None]:
        """One block and one grafted layer, whose cache stands behind the language model's."""
        layer, place, *conditioned = inputs
        x, text, windows = carry
        behind = self.depth + place
        x, windows = self._run_block(x, windows, place, *conditioned)
        x, new = self._run_grafted(x, _take(text, behind), layer)
        return (x, _put(text, new, behind), windows), None

    def _layer(
        self, x: Array, cache: Any, windows: Any, place: Array, *conditioned: Any
    ) -> tuple[Array, Any, Any]:
        # The weights of a layer are taken within what is computed again, or a copy of all of
        # them would be saved for the gradient.
        layer = nnx.merge(self.layers_graph, _take(self.layers, place))

        def between(x: Array) -> Array:
            nonlocal windows
            x, windows = self._block(x, windows, *conditioned)
            return x

        x, cache = self.read_text(layer, x, cache, between if conditioned else None)
        return x, cache, windows

    def _block(
        self, x: Array, windows: Any, place: Array, block: Any, media: Any
    ) -> tuple[Array, Any]:
        block = nnx.merge(self.blocks_graph, block)
        x, new = self.read_visuals(block, x, media, _take(windows, place))
        return x, _put(windows, new, place)

    def _grafted(self, x: Array, cache: Any, layer: Any) -> tuple[Array, Any]:
        return self.read_text(nnx.merge(self.grafted_graph, layer), x, cache, None)


def _take(tree: Any, place: Array) -> Any:
    """One layer of a stack's arrays."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, place, 0, keepdims=False), tree)


def _put(cache: Any, new: Any, place: Array) -> Any:
    """A stack's cache with one layer's in its place."""

    def put(whole: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(whole, part, place, 0)

    return map_cache(put, cache, new)
