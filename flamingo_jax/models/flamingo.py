"""Flamingo: a frozen vision encoder, a frozen language model, and the trained resampler and
gated cross-attention that connect them (paper figure 3).

`Flamingo.hidden_states` is the forward pass of training and evaluation; `Flamingo.decode` is
generation with a key-value cache. Both run the same layers.

Shapes: B rows, L tokens of a row, N visuals of a row; S, T a token stream (see
`models.packing`); M visuals, T frames, R visual tokens per visual; D the language model's
width, C the encoder's, V its vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from flamingo_jax.experiment import FlamingoConfig, LoRAConfig
from flamingo_jax.models.attention import causal_mask
from flamingo_jax.models.cache import LINE, Cache, Continuation
from flamingo_jax.models.conditioning import (
    ConditionedLayers,
    CrossAttentionBlock,
    CrossAttentionBlocks,
    DecodingCache,
    GraftedLayers,
    Media,
    PreparedVisuals,
    count_blocks,
    media_mask,
)
from flamingo_jax.models.language_model import LanguageModel, empty_cache
from flamingo_jax.models.layers import (
    fan_in_normal,
    linear,
    zero_nonfinite,
)
from flamingo_jax.models.packing import (
    MediaView,
    PackedText,
    Parts,
    join,
    pack,
    split,
)
from flamingo_jax.models.resamplers import make_resampler
from flamingo_jax.models.vision import encode_frames, vision_encoder
from flamingo_jax.partitioning.constraints import (
    constrain,
    residual,
)
from flamingo_jax.partitioning.mesh import MODEL, ROWS

Array = jax.Array


class HiddenStates(NamedTuple):
    """The last hidden states x [S, T, D] of a stream, before the final norm.

    broken: bool [S, T], the tokens that attend to a visual with a NaN or infinity, and the
      later tokens of their segment. Their states are computed with zeros in place of that
      visual's tokens, so that no NaN reaches a matrix product or a gradient of other tokens;
      the caller must set their losses or logits to NaN.
    """

    x: Array
    broken: Array


def _reached(
    texts: Sequence[PackedText], view: MediaView, lost: Array, tokens_per_visual: int
) -> list[Array]:
    """Finds the tokens, bool [B_p, L_p] of every part, that attend to a lost visual, or come
    after such a token in their segment.

    lost: bool [S, V], or [M] where `view.visuals` indexes it: visuals that are not finite.
    """
    lost = lost if view.visuals is None else lost[view.visuals]
    owned = [(m.shape[0], m.shape[-1] // tokens_per_visual) for m in view.masks]
    found = []
    for text, mask, own in zip(texts, view.masks, split(lost[..., None], owned), strict=True):
        visuals = own.reshape(mask.shape[0], 1, -1)  # [B, 1, N]
        # All tokens of a visual have the same mask: every R-th column stands for one visual.
        looks = (mask[:, 0, :, ::tokens_per_visual] & visuals).any(-1)
        found.append((causal_mask(text.segments)[:, 0] & looks[:, None]).any(-1))
    return found


def _where_something_is_seen(text_masks: Parts, masks: Parts) -> tuple[Array, ...]:
    """Clears the text masks [B, 1, L, S] of tokens that attend to no visual, so that
    cross-attention gives them exactly zero.
    """
    return tuple(
        text & mask.any(-1, keepdims=True) for text, mask in zip(text_masks, masks, strict=True)
    )


def _take(x: Array, places: Array) -> Array:
    """Takes tokens `places`, int32 [B, P], of rows [B, L, D] -> [B, P, D]."""
    return jnp.take_along_axis(x, places[..., None], axis=1)


class Flamingo(nnx.Module):
    """Models p(text | visuals), the paper's equation (1).

    Token ids from the language model's vocabulary size on are added, trained tokens, `<EOC>`
    first. Their vectors are in `extra_embedding`, for input and output alike, so that the
    frozen embedding table does not change.

    Args:
      dtype: compute dtype of the activations.
      remat: what the backward pass recomputes (see `layers.remat`).
      frames_at_once: how many frames each device encodes at a time, 0 for all.
      encoder_trains: the vision encoder is trained too; its activations are then recomputed in
        the backward pass if `remat` is not "none" or frames are encoded in several rounds.
      lora: low-rank updates of the otherwise frozen language model; None for none.
    """

    def __init__(
        self,
        config: FlamingoConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        frames_at_once: int = 0,
        encoder_trains: bool = False,
        lora: LoRAConfig | None = None,
    ):
        self.config = config
        self.dtype = dtype
        self.remat = remat
        self.frames_at_once = frames_at_once
        self.encoder_trains = encoder_trains
        width = config.language_model.width
        self.vision_encoder = vision_encoder(config.vision, rngs=rngs)
        self.resampler = make_resampler(
            config.resampler,
            self.vision_encoder.width,
            self.vision_encoder.grid,
            rngs=rngs,
            remat=remat,
        )
        self.visual_projection = fan_in_normal(rngs, (config.resampler.width, width))
        lm, conditioning = config.language_model, config.conditioning
        self.gated_xattn = CrossAttentionBlocks(conditioning, lm, rngs=rngs)
        self.language_model = LanguageModel(lm, rngs=rngs, dtype=dtype, lora=lora)
        self.extra_embedding = fan_in_normal(rngs, (config.extra_tokens, width), width)
        self.grafted = (
            GraftedLayers(conditioning, lm, rngs=rngs) if conditioning.kind == "grafting" else None
        )

    def encode_images(self, images: Parts) -> list[Array]:
        """Encodes the images of several datasets, uint8 [M, T, H, W, 3] each, as one batch
        over all devices -> grid features [M, T, cells, C] of each; see `vision.encode_frames`.
        """
        return encode_frames(
            self.vision_encoder,
            self.config.vision,
            images,
            dtype=self.dtype,
            frames_at_once=self.frames_at_once,
            trains=self.encoder_trains,
            remat_mode=self.remat,
        )

    def encode_visuals(self, images: Array, frame_mask: Array) -> Array:
        """Encodes one dataset's visuals: uint8 [M, T, H, W, 3] and frame mask bool [M, T] ->
        visual tokens [M, R, D].
        """
        return self._resample(self.encode_images([images])[0], frame_mask)

    def resample(self, features: Parts, frame_masks: Parts) -> Array:
        """Resamples the grid features [M, T, cells, C] and frame masks bool [M, T] of several
        datasets -> visual tokens [S, V, R, D] for `hidden_states`, dataset after dataset; NaN
        for a visual whose features are not all finite.

        Visuals with equal numbers of frames T go through the resampler as one batch, whatever
        their dataset.
        """
        found: dict[int, Array] = {}
        for count in {part.shape[1] for part in features}:
            places = [place for place, part in enumerate(features) if part.shape[1] == count]
            grids, masks = (
                join([parts[place][:, None] for place in places])
                for parts in (features, frame_masks)
            )
            groups, visuals = grids.shape[:2]
            grids = constrain(grids.reshape(-1, *grids.shape[2:]), ROWS).astype(self.dtype)
            tokens = self._resample(grids, masks.reshape(-1, count))
            tokens = tokens.reshape(groups, visuals, *tokens.shape[1:])
            shapes = [(features[place].shape[0], 1) for place in places]
            found |= dict(zip(places, split(tokens, shapes), strict=True))
        return join([found[place] for place in range(len(features))])

    def _resample(self, features: Array, frame_mask: Array) -> Array:
        """Resamples grid features [M, T, cells, C] and projects them to the language model's
        width -> visual tokens [M, R, D]; NaN for a visual whose features are not all finite.
        """
        tokens, broken = zero_nonfinite(self.resampler(features, frame_mask), (1, 2))
        return jnp.where(
            broken[:, None, None], jnp.nan, linear(tokens, self.visual_projection[...])
        )

    def prepare_media(self, visual_tokens: Array) -> PreparedVisuals:
        """Computes every cross-attention block's keys and values of visual tokens [M, R, D],
        once for all decoding steps.
        """
        graph, state = nnx.split(self.gated_xattn.layers)
        tokens, broken = zero_nonfinite(visual_tokens, (1, 2))
        media = jax.lax.map(lambda s: nnx.merge(graph, s).project_visuals(tokens), state)
        # Heads over `model`; every row may attend to any visual.
        media = jax.tree.map(lambda a: constrain(a, None, None, None, MODEL), media)
        return PreparedVisuals(media, broken)

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        segments: Array,
        media_index: Array,
        visual_tokens: Array | None,
        visuals: Array | None,
        *,
        rows_own_visuals: bool = False,
    ) -> Array:
        """Computes the logits of one dataset's packed rows, float32 [B, L, V + extra]; NaN for
        tokens that a non-finite visual reaches, see `HiddenStates`.

        Args:
          tokens, positions, segments, media_index: int32 [B, L], see `PackedText`.
          visual_tokens: [M, R, D] of `encode_visuals`; None computes the language model's
            logits without any visual.
          visuals: int32 [B, N], each row's visuals as indices into M, -1 for none.
          rows_own_visuals: M = B * N and row b's visual n is number b * N + n (as in training
            batches), so that no gather is needed: the gradient of a gather is a scatter, slow
            on every backend.
        """
        hidden = self.hidden_states(
            [PackedText(tokens, positions, segments, media_index, visuals)],
            visual_tokens,
            rows_own_visuals=rows_own_visuals,
        )
        return jnp.where(hidden.broken[..., None], jnp.nan, self._logits(hidden.x))

    def hidden_states(
        self,
        texts: Sequence[PackedText],
        visual_tokens: Array | None,
        *,
        rows_own_visuals: bool = True,
    ) -> HiddenStates:
        """Runs the forward pass of training and evaluation on packed rows of one dataset or
        several -> last hidden states [S, T, D] of their stream.

        Args:
          visual_tokens: [M, R, D], or for several datasets [S, V, R, D] of `resample`; None
            runs the language model without any visual.
          rows_own_visuals: see `__call__`; required for several datasets.
        """
        stream, view = pack(texts), None
        broken = jnp.zeros(stream.tokens.shape, bool)
        if visual_tokens is not None:
            # Zeroed before any product: 0 x NaN is NaN, so that a mask could not keep one
            # broken image out of the other rows' gradients.
            visual_tokens, lost = zero_nonfinite(visual_tokens, (-2, -1))
            view = self._media_view(stream.texts, visual_tokens.shape[-2], rows_own_visuals)
            broken = join(_reached(stream.texts, view, lost, visual_tokens.shape[-2]))

        def read_visuals(
            block: CrossAttentionBlock, x: Array, _: None, window: None
        ) -> tuple[Array, None]:
            if visual_tokens is None:
                return block.attend(x, None, None), None
            media, text = block.project_visuals(visual_tokens), block.project_text(x)
            return block.attend(x, media, view, text), None

        def read_text(layer: Any, x: Array, cache: None, between: Any) -> tuple[Array, None]:
            return layer(x, stream.positions, stream.packing, cache, between)

        x = residual(self._embed(stream.tokens, stream.positions))
        x, _ = self._run_layers(x, None, read_text, read_visuals, None)
        return HiddenStates(stream.restore(x), stream.restore(broken))

    def cross_attention(
        self, text: PackedText, visual_tokens: Array, places: Array
    ) -> tuple[Array, Array]:
        """Runs packed rows as `__call__` does and returns, for some of their tokens, the logits
        float32 [B, P, V + extra] and the weights that each cross-attention block gives the
        rows' visual tokens, averaged over heads: float32 [blocks, B, P, N, R].

        Args:
          text: with its visuals; `positions` and `segments` as in training.
          visual_tokens: [M, R, D] of `encode_visuals`, all finite.
          places: int32 [B, P], the tokens to return.
        """
        assert text.visuals is not None
        stream = pack([text])
        view = self._media_view(stream.texts, visual_tokens.shape[1], False)

        def read_visuals(block: CrossAttentionBlock, x: Array, *_: Any) -> tuple[Array, Array]:
            media, own = block.project_visuals(visual_tokens), block.project_text(x)
            weights = block.weights(x, media, view, own)
            return block.attend(x, media, view, own), _take(weights, places)

        def read_text(layer: Any, x: Array, cache: None, between: Any) -> tuple[Array, None]:
            return layer(x, stream.positions, stream.packing, cache, between)

        x = residual(self._embed(stream.tokens, stream.positions))
        blocks = count_blocks(self.config.conditioning, self.config.language_model)
        # The layers collect the blocks' weights where decoding keeps their text windows.
        kept = jnp.zeros((blocks, *places.shape, view.masks[0].shape[-1]))
        x, cache = self._run_layers(x, DecodingCache(None, kept), read_text, read_visuals, None)
        weights = cache.windows.reshape(*kept.shape[:3], text.visuals.shape[1], -1)
        return self._logits(_take(x, places)), weights

    def _media_view(
        self, texts: Sequence[PackedText], tokens_per_visual: int, rows_own_visuals: bool
    ) -> MediaView:
        """Makes the cross-attention masks from each text's `media_index`; a text without
        visuals gets a mask over 0 keys.
        """
        masks = []
        for text in texts:
            if text.visuals is None or text.media_index is None:
                masks.append(jnp.zeros((text.tokens.shape[0], 1, text.tokens.shape[1], 0), bool))
                continue
            masks.append(
                media_mask(
                    text.media_index,
                    text.segments,
                    text.visuals,
                    tokens_per_visual,
                    self.config.conditioning.attend_to_media,
                )
            )
        view = MediaView(tuple(masks), None if rows_own_visuals else texts[0].visuals)
        if window := self.config.conditioning.text_window:
            windows = [causal_mask(text.segments, window) for text in texts]
            view = view._replace(text_masks=_where_something_is_seen(windows, masks))
        return view

    def logit_parts(self, x: Array) -> tuple[Array, ...]:
        """Computes logits for the loss: hidden states [S, T, D] -> float32 [S, T, V], sharded
        over `model` along V, and float32 [S, T, extra]. They are not concatenated, since
        V + extra does not divide over `model`.
        """
        return constrain(self.language_model.logits(x), ROWS, None, MODEL), self._extra_logits(x)

    def init_cache(self, batch: int, slots: int, length: int | None = None) -> DecodingCache:
        """Allocates a decoding cache; axis 1 of all arrays but `SharedCache` is the batch.

        length: the positions of the longest row, by default as many as slots.
        """
        lm, conditioning = self.config.language_model, self.config.conditioning
        cache = empty_cache(self.language_model.layers, lm, batch, slots, self.dtype, length)
        if self.grafted is not None:
            # The grafted layers' caches follow the language model's on the layer axis.
            grafted = empty_cache(self.grafted.layers, lm, batch, slots, self.dtype, length)
            cache = jax.tree.map(lambda *parts: jnp.concatenate(parts), cache, grafted)
        if not conditioning.text_window:
            return DecodingCache(cache)
        blocks = count_blocks(conditioning, lm)
        shape = (blocks, batch, conditioning.heads, slots, conditioning.head_width)
        empty = constrain(jnp.zeros(shape, self.dtype), None, ROWS, MODEL)
        return DecodingCache(cache, Media(empty, empty))

    def decode(
        self,
        tokens: Array,
        positions: Array,
        media_index: Array,
        media: PreparedVisuals | None,
        visuals: Array | None,
        cache: DecodingCache,
        continuation: Continuation = LINE,
        *,
        rows_own_visuals: bool = False,
    ) -> tuple[Array, DecodingCache]:
        """Decodes L more tokens of each row: one at a step of generation, or a whole prompt.

        Args:
          tokens, positions: int32 [B, L]. The position is the token's cache slot, and one past
            the last slot is padding: the token is not cached and its logits are meaningless.
          media_index: int32 [B, L], phi: an index into the row's `visuals`, -1 for none.
          media: of `prepare_media`; None decodes without any visual.
          visuals: int32 [B, N], each row's visuals as indices into M, -1 for none.
          cache: the tokens so far.
          continuation: how the L tokens continue their row: by default one after the other.
          rows_own_visuals: `media` and `visuals` are of `PreparedVisuals.of_rows`.

        Returns: logits float32 [B, L, V + extra], and the cache with these tokens added. The
          logits of a token that attends to a broken visual are NaN, and so are those of all
          later tokens of its row.
        """
        x, view = self._embed(tokens, positions), None
        if media is not None:
            assert visuals is not None
            tokens_per_visual = media.media.key.shape[3 if rows_own_visuals else 2]
            mask = media_mask(
                media_index,
                None,
                visuals,
                tokens_per_visual,
                self.config.conditioning.attend_to_media,
            )
            looks = (mask[:, 0, :, ::tokens_per_visual] & media.broken[visuals][:, None]).any(-1)
            # NaN on purpose: the cache carries it to the row's later tokens.
            x = jnp.where(looks[..., None], jnp.nan, x)
            view = MediaView((mask,), None if rows_own_visuals else visuals)
            if cache.windows is not None:
                window, slots = self.config.conditioning.text_window, cache.windows.key.shape[3]
                seen = continuation.mask(positions, slots, window)
                view = view._replace(text_masks=_where_something_is_seen([seen], [mask]))

        def read_visuals(
            block: CrossAttentionBlock, x: Array, own: Media | None, window: Media | None
        ) -> tuple[Array, Media | None]:
            if own is not None and rows_own_visuals:
                own = Media(*(a.swapaxes(1, 2) for a in own))  # They are heads first.
            if window is None:
                return block.attend(x, own, view), None
            new = zip(window, block.project_text(x) or (), strict=True)
            texts, kept = zip(*(continuation.extend(*pair, positions) for pair in new), strict=True)
            return block.attend(x, own, view, Media(*texts)), Media(*kept)

        def read_text(
            layer: Any, x: Array, layer_cache: Cache, between: Any
        ) -> tuple[Array, Cache]:
            return layer(x, positions, continuation, layer_cache, between)

        own = None if media is None else media.media
        x, cache = self._run_layers(x, cache, read_text, read_visuals, own)
        return self._logits(x), cache

    def _run_layers(
        self,
        x: Array,
        cache: DecodingCache | None,
        read_text: Any,
        read_visuals: Any,
        media: Media | None,
    ) -> tuple[Array, Any]:
        """Runs the language model's layers and the cross-attention blocks between them on x
        [B, L, D]: see `ConditionedLayers`.
        """
        run = ConditionedLayers(
            self.config.conditioning,
            self.language_model.layers,
            self.gated_xattn.layers,
            None if self.grafted is None else self.grafted.layers,
            read_text,
            read_visuals,
            self.remat,
        )
        return run(x, cache, media)

    def _embed(self, tokens: Array, positions: Array) -> Array:
        """Embeds tokens int32 [B, L] -> [B, L, D], the added ones from `extra_embedding`."""
        vocabulary = self.config.language_model.vocab_size
        frozen = self.language_model.embed(jnp.minimum(tokens, vocabulary - 1))
        extra = self.extra_embedding[...][jnp.maximum(tokens - vocabulary, 0)].astype(self.dtype)
        x = jnp.where(
            (tokens >= vocabulary)[..., None],
            extra * self.config.language_model.embedding_scale,
            frozen,
        )
        return self.language_model.add_positions(x, positions)

    def _logits(self, x: Array) -> Array:
        # Two products, concatenated: a single one over V + extra columns would change the last
        # bits of the frozen language model's logits.
        # On a mesh gathered first: V + extra does not divide over `model`.
        frozen = constrain(self.language_model.logits(x), ROWS)
        return jnp.concatenate([frozen, self._extra_logits(x)], axis=-1)

    def _extra_logits(self, x: Array) -> Array:
        return linear(self.language_model.final_norm(x), self.extra_embedding[...].T).astype(
            jnp.float32
        )
