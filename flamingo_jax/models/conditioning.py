"""Conditioning: cross-attention from text to visual tokens, and its place among the frozen
language model's layers (paper 2.2, figure 4; ablated in 3.3).

The config's `kind` says where the cross-attention blocks are: before layers of the language
model (`gated_xattn_dense`, the paper's choice), between the two halves of its layers
(`vanilla_xattn`), or after all of them, alternating with new decoder layers (`grafting`). A
block's keys and values of a visual are computed once (`project_visuals`); `attend` updates the
text. `ConditionedLayers` is the loop over layers and blocks in training, evaluation and
decoding.
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
from flamingo_jax.models.attention import attend, mean_weights
from flamingo_jax.models.cache import Cache, Continuation, map_cache
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
from flamingo_jax.partitioning.constraints import (
    all_gather,
    constrain,
    reduce_scatter,
    residual,
)
from flamingo_jax.partitioning.mesh import MODEL, ROWS

Array = jax.Array
Between = Callable[[Array], Array]
"""Updates the residual stream between a decoder layer's attention and its feed-forward."""


class Media(NamedTuple):
    """A block's keys and values: of M visuals with R tokens each, [M, R, H, d]; or of text,
    [S, T, H, d].
    """

    key: Array
    value: Array


class PreparedVisuals(NamedTuple):
    """M visuals, encoded and projected once for decoding.

    media: the keys and values of every cross-attention block, leaves [blocks, M, R, H, d].
    broken: bool [M], visuals with a NaN or infinity; their tokens are replaced by zeros.
    """

    media: Media
    broken: Array

    def of_rows(self, visuals: Array) -> tuple["PreparedVisuals", Array]:
        """Lists the visuals row by row, so that no decoding step gathers them: `visuals`, int32
        [B, N] with -1 for none -> M = B * N visuals and their numbers, int32 [B, N].
        """
        listed = jnp.maximum(visuals, 0).reshape(-1)
        numbers = jnp.arange(listed.size).reshape(visuals.shape)
        # Heads first, [blocks, M, H, R, d], as keys and values in a `cache`, and each row's
        # visuals where the row is.
        media = jax.tree.map(
            lambda a: constrain(jnp.take(a, listed, axis=1).swapaxes(2, 3), None, ROWS, MODEL),
            self.media,
        )
        return PreparedVisuals(media, self.broken[listed]), jnp.where(visuals >= 0, numbers, -1)


def media_mask(
    media_index: Array,
    segments: Array | None,
    visuals: Array,
    tokens_per_visual: int,
    attend_to: str,
) -> Array:
    """Makes the cross-attention mask: which visual tokens each text token attends to, bool
    [B, 1, L, N * R] (paper 2.3).

    Args:
      media_index: int32 [B, L], phi: an index into the row's visuals, -1 for none.
      segments: int32 [B, L], or None where every row is one segment.
      visuals: int32 [B, N], -1 for none.
      tokens_per_visual: R.
      attend_to: "last" (the paper's): only visual phi; "all_previous": also those before it in
        the same segment.
    """
    places = jnp.arange(visuals.shape[1])
    mask = media_index[:, :, None] == places  # [B, L, N]
    if attend_to == "all_previous":
        before = media_index[:, :, None] >= places
        if segments is not None:
            # A visual belongs to the segment of the tokens that attend to it: [B, N].
            owner = jnp.max(jnp.where(mask, segments[:, :, None], 0), axis=1)
            before = before & (owner[:, None, :] == segments[:, :, None])
        # Or-ed with `mask`: several segments may attend to one visual, whose owner is then the
        # last of them.
        mask = mask | before
    mask = mask & (visuals >= 0)[:, None, :]
    return jnp.repeat(mask, tokens_per_visual, axis=-1)[:, None]


class CrossAttentionBlock(nnx.Module):
    """y += tanh(a) * CrossAttn(LN(y), LN(X)); y += tanh(b) * FFW(LN(y)), with both gates 0 at
    the start (unless `config.gate_init`).

    `vanilla_xattn` has only the first of the two updates. Without gating both gates are the
    constant 1.

    Keys and values share one LayerNorm (paper v1, 3.1.2). Nothing between the attention and
    the residual sum has a bias, so that a token without a visual gets exactly zero.
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
        """Computes keys and values of visual tokens [M, R, D] -> [M, R, H, d], once per visual
        however many rows attend to it.
        """
        x = self.media_norm(visual_tokens)
        # The keys alone are saved for the backward pass: the values are cheap to recompute and
        # as large.
        return Media(save_for_backward(linear(x, self.key[...])), linear(x, self.value[...]))

    def project_text(self, y: Array) -> Media | None:
        """Computes keys and values of the text, [S, T, D] -> [S, T, H, d], by the visuals'
        maps; None without `text_window`.
        """
        if not self.text_window:
            return None
        x = all_gather(self.attention_norm(y))
        return Media(save_for_backward(linear(x, self.key[...])), linear(x, self.value[...]))

    def attend(
        self, y: Array, media: Media | None, view: MediaView | None, text: Media | None = None
    ) -> Array:
        """Applies the block to the text's residual stream y [S, T, D] -> [S, T, D].

        Args:
          media: of `project_visuals`; None without visuals, where only the dense half runs.
          view: the masks, which visual (and text) tokens each token attends to.
          text: of `project_text`.
        """
        if media is not None:
            assert view is not None
            # [S, T, D] -> [S, T, H, d]
            query = save_for_backward(linear(all_gather(self.attention_norm(y)), self.query[...]))
            h = view.over_rows(attend, query, media.key, media.value, text)
            y = save_for_backward(residual(y + reduce_scatter(self._gated_out(h))))
        if self.feed_forward is None or self.dense_norm is None:
            return y
        h = all_gather(self.dense_norm(y))
        return residual(y + reduce_scatter(self.feed_forward(h, _tanh_gate(self.dense_gate))))

    def weights(self, y: Array, media: Media, view: MediaView, text: Media | None = None) -> Array:
        """Computes the weights that `attend` gives visual tokens, averaged over heads: float32
        [S, T, N * R]. A row sums to 1; to 0 for a token without a visual; to less than 1 where
        text tokens share the softmax (`text_window`).
        """

        def weigh(query: Array, key: Array, _: Array, mask: Array) -> Array:
            return mean_weights(query, key, mask)[:, :, None]

        query = linear(all_gather(self.attention_norm(y)), self.query[...])
        found = view.over_rows(weigh, query, media.key, media.value, text)[:, :, 0]
        return found[..., : view.masks[0].shape[-1]]

    def _gated_out(self, h: Array) -> Array:
        """Maps heads back to the model width and applies the gate: [..., H, d] -> [..., D]."""
        gate = _tanh_gate(self.attention_gate)
        weight = self.out[...]
        return linear(h, weight, 2) if gate is None else gated_linear(h, weight, gate, 2)


def make_gate(config: ConditioningConfig) -> nnx.Param | None:
    """Makes a scalar gate, before its tanh; None without gating."""
    return nnx.Param(jnp.full((), config.gate_init)) if config.gating == "tanh" else None


def _tanh_gate(gate: nnx.Param | None) -> Array | None:
    """Returns tanh(gate), in -1 .. 1; None without a gate."""
    return None if gate is None else jnp.tanh(gate[...])


class CrossAttentionBlocks(nnx.Module):
    """The stack of a model's cross-attention blocks."""

    def __init__(self, config: ConditioningConfig, lm: LanguageModelConfig, *, rngs: nnx.Rngs):
        self.layers = stack(
            lambda r: CrossAttentionBlock(config, lm.width, rngs=r), count_blocks(config, lm), rngs
        )


def count_blocks(config: ConditioningConfig, lm: LanguageModelConfig) -> int:
    """Counts the cross-attention blocks of a model.

    Raises: UserError for settings that contradict each other or the language model.
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
    """A decoder layer that is trained from scratch on the frozen language model's output.

    With tanh gating x += tanh(gate) * (layer(x) - x), so that training starts from the
    language model's own outputs, as with the other kinds (the paper does not say how its
    grafted layers are initialised).
    """

    def __init__(self, config: ConditioningConfig, lm: LanguageModelConfig, *, rngs: nnx.Rngs):
        super().__init__(lm, rngs=rngs)
        self.gate = make_gate(config)

    def __call__(
        self,
        x: Array,
        positions: Array,
        packing: Packing | Continuation,
        cache: Cache | None,
        between: Between | None = None,
    ) -> tuple[Array, Cache | None]:
        """Runs the layer on a stream x [S, T, D]; arguments as for `DecoderLayer`."""
        y, cache = super().__call__(x, positions, packing, cache, between)
        if self.gate is None:
            return y, cache
        return x + broadcast_param(jnp.tanh(self.gate[...]), x) * (y - x), cache


class GraftedLayers(nnx.Module):
    """The stack of trained decoder layers of `grafting`."""

    def __init__(self, config: ConditioningConfig, lm: LanguageModelConfig, *, rngs: nnx.Rngs):
        self.layers = stack(lambda r: GraftedLayer(config, lm, rngs=r), config.grafted_layers, rngs)


class DecodingCache(NamedTuple):
    """The decoding cache of a whole model.

    text: keys and values of the decoder layers, the grafted ones last on the layer axis.
    windows: with `text_window`, the cross-attention blocks' keys and values of the text,
      [blocks, B, H, S, d], in the same slots. More generally what the blocks keep, any arrays
      [blocks, ...].
    """

    text: Cache | None
    windows: Any = None


class ConditionedLayers:
    """Runs the language model's layers and the cross-attention blocks, in the order of the
    config's `kind`.

    For `gated_xattn_dense`, with xattn_every = 4:

        layers before xattn_first; then groups of (block, layer, layer, layer, layer); then a
        last, shorter group.

    The language model stays one stack [L, ...] that each step indexes, since its depth need
    not be a multiple of `xattn_every` (the 80B model's 80 layers are 11 groups of 7 and one of
    3) and slicing a stack into groups would copy the frozen weights.

    Args:
      layers: the language model's stack of decoder layers.
      blocks: the stack of cross-attention blocks.
      grafted: for `grafting`, the stack of its decoder layers, as many as blocks.
      read_text: runs a decoder layer: (layer, x, its cache, between) -> x, its cache.
      read_visuals: runs a block: (block, x, its media, its window) -> x, its window.
      remat_mode: what the backward pass recomputes (see `layers.remat`).
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
        self._decoded: Any = None
        self.depth = jax.tree.leaves(self.layers)[0].shape[0]
        self.count = jax.tree.leaves(self.blocks)[0].shape[0]
        self._run_layer = remat(self._layer, remat_mode)
        self._run_block = remat(self._block, remat_mode)
        self._run_grafted = remat(self._grafted, remat_mode)

    def __call__(
        self, x: Array, cache: DecodingCache | None, media: Any
    ) -> tuple[Array, DecodingCache | None]:
        """Runs all layers on x [B, L, D] -> [B, L, D], and the cache with these tokens added.

        media: every block's keys and values of the visuals, leaves [blocks, ...]; None where
          `read_visuals` projects them itself.
        """
        # The scans carry (x, the text's cache, the windows' cache); the inputs of each block
        # are its number, parameters and media.
        carry = (x, *(cache or (None, None)))
        given: Any = (jnp.arange(self.count), self.blocks, media)
        if cache is not None:
            # Decoding indexes them by number, as the language model's layers: of an unrolled
            # scan's inputs XLA makes slices, which it copies at every token where it takes what
            # is indexed out of the loop over tokens. In training their gradients would then be
            # sums of whole stacks.
            self._decoded, given = (self.blocks, media), (given[0], None, None)
        if self.config.kind == "grafting":
            carry = self._run_layers(carry, 0, self.depth)
            carry, _ = jax.lax.scan(self._graft_step, carry, (self.grafted, *given))
        else:
            carry = self._interleaved(carry, given)
        x, *kept = carry
        return x, None if cache is None else DecodingCache(*kept)

    def _interleaved(self, carry: Any, given: Any) -> Any:
        """Runs the layers before `xattn_first`, then groups of a block and `xattn_every`
        layers.
        """
        first, every = self.config.xattn_first, self.config.xattn_every
        carry = self._run_layers(carry, 0, first)
        groups, rest = divmod(self.depth - first, every)
        if groups:
            starts = first + jnp.arange(groups) * every
            whole = jax.tree.map(lambda a: a[:groups], given) if rest else given
            group = functools.partial(self._group, count=every)
            unroll = ops.scan_unroll(groups)
            carry, _ = jax.lax.scan(group, carry, (starts, *whole), unroll=unroll)
        if not rest:
            return carry
        # The shorter last group runs after the scan: a condition inside it would keep the
        # largest arrays of both branches, and the group's weights, in memory.
        last = jax.tree.map(lambda a: a[groups], given)
        return self._group(carry, (jnp.int32(first + groups * every), *last), rest)[0]

    def _group(self, carry: Any, inputs: Any, count: int) -> tuple[Any, None]:
        """Runs a block and `count` layers, the block before the first layer or, for
        `vanilla_xattn`, within it. The body of a scan.
        """
        first, *conditioned = inputs
        if self.config.kind == "vanilla_xattn":
            carry, _ = self._step(carry, first, *conditioned)
            return self._run_layers(carry, first + 1, count - 1), None
        x, text, windows = carry
        x, windows = self._run_block(x, windows, *conditioned)
        return self._run_layers((x, text, windows), first, count), None

    def _run_layers(self, carry: Any, first: Any, count: int) -> Any:
        """Runs `count` layers from number `first` on, without a block."""
        if count <= 1:
            return self._step(carry, jnp.int32(first))[0] if count else carry
        places = first + jnp.arange(count)
        return jax.lax.scan(self._step, carry, places, unroll=ops.scan_unroll(count))[0]

    def _step(self, carry: Any, place: Array, *conditioned: Any) -> tuple[Any, None]:
        """Runs layer number `place` of the language model; `conditioned`: the number,
        parameters and media of a block between its halves, if there is one.
        """
        x, text, windows = carry
        x, new, windows = self._run_layer(
            x, _index_layer(text, place), windows, place, *conditioned
        )
        return (x, _write_layer(text, new, place), windows), None

    def _graft_step(self, carry: Any, inputs: Any) -> tuple[Any, None]:
        """Runs one block and one grafted layer, whose cache follows the language model's."""
        layer, place, *conditioned = inputs
        x, text, windows = carry
        behind = self.depth + place
        x, windows = self._run_block(x, windows, place, *conditioned)
        x, new = self._run_grafted(x, _index_layer(text, behind), layer)
        return (x, _write_layer(text, new, behind), windows), None

    def _layer(
        self, x: Array, cache: Any, windows: Any, place: Array, *conditioned: Any
    ) -> tuple[Array, Any, Any]:
        """Runs decoder layer number `place`, with the block of `conditioned` between its
        halves if there is one. Wrapped in `remat`.
        """
        # The layer's weights are indexed inside the rematerialised function: outside it, the
        # backward pass would save a copy of every layer's weights.
        layer = nnx.merge(self.layers_graph, _index_layer(self.layers, place))

        def between(x: Array) -> Array:
            nonlocal windows
            x, windows = self._block(x, windows, *conditioned)
            return x

        x, cache = self.read_text(layer, x, cache, between if conditioned else None)
        return x, cache, windows

    def _block(
        self, x: Array, windows: Any, place: Array, block: Any, media: Any
    ) -> tuple[Array, Any]:
        """Runs the block of number `place`, whose parameters are `block`, on x; None for those
        of `_decoded`.
        """
        if block is None:
            block, media = _index_layer(self._decoded, place)
        block = nnx.merge(self.blocks_graph, block)
        x, new = self.read_visuals(block, x, media, _index_layer(windows, place))
        return x, _write_layer(windows, new, place)

    def _grafted(self, x: Array, cache: Any, layer: Any) -> tuple[Array, Any]:
        """Runs the grafted layer whose parameters are `layer` on x."""
        return self.read_text(nnx.merge(self.grafted_graph, layer), x, cache, None)


def _index_layer(tree: Any, place: Array) -> Any:
    """Indexes one layer of a stack: leaves [layers, ...] -> [...]."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, place, 0, keepdims=False), tree)


def _write_layer(cache: Any, new: Any, place: Array) -> Any:
    """Writes one layer's cache into a stack's, leaves [layers, ...]; shared arrays stay."""

    def put(whole: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(whole, part, place, 0)

    return map_cache(put, cache, new)
