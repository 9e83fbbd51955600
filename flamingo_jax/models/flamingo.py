"""The visual language model: frozen encoder and language model, and the trained parts between them (paper figure 3)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flamingo_jax.experiment import FlamingoConfig
from flamingo_jax.models.attention import Cache
from flamingo_jax.models.gated_xattn import GatedCrossAttentionBlock, Media, media_mask
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.models.layers import fan_in_normal, linear, stack
from flamingo_jax.models.perceiver import PerceiverResampler
from flamingo_jax.models.vision import vision_encoder
from flamingo_jax.processing.normalise import normalise

Array = jax.Array


class GatedBlocks(nnx.Module):
    """The stack of gated blocks, one before language model layers 0, every, 2 every, ..."""

    def __init__(self, config: FlamingoConfig, *, rngs: nnx.Rngs):
        count = math.ceil(config.language_model.layers / config.every)
        self.layers = stack(lambda r: GatedCrossAttentionBlock(config, rngs=r), count, rngs)


class Flamingo(nnx.Module):
    """p(text | visuals): see the paper's equation (1).

    Token ids from the language model's vocabulary size on are the trained additions, `<EOC>` first; they live in
    `extra_embedding` for input and output, so that the frozen table stays as it is.
    """

    def __init__(self, config: FlamingoConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        self.dtype = dtype
        width = config.language_model.width
        self.vision_encoder = vision_encoder(config.vision, rngs=rngs)
        self.resampler = PerceiverResampler(config.resampler, self.vision_encoder.width, rngs=rngs)
        self.visual_projection = fan_in_normal(rngs, (config.resampler.width, width))
        self.gated_xattn = GatedBlocks(config, rngs=rngs)
        self.language_model = LanguageModel(config.language_model, rngs=rngs, dtype=dtype)
        self.extra_embedding = fan_in_normal(rngs, (config.extra_tokens, width), width)

    def encode_images(self, images: Array) -> Array:
        """uint8 [M, T, H, W, 3] -> grid features [M, T, S, C]."""
        vision = self.config.vision
        visuals, frames = images.shape[:2]
        x = normalise(images.reshape(-1, *images.shape[2:]), vision.mean, vision.std, self.dtype)
        features = self.vision_encoder(x)
        return features.reshape(visuals, frames, -1, features.shape[-1])

    def resample(self, features: Array, frame_mask: Array) -> Array:
        """Grid features [M, T, S, C] -> visual tokens [M, R, D] in the language model's width."""
        return linear(self.resampler(features, frame_mask), self.visual_projection[...])

    def encode_visuals(self, images: Array, frame_mask: Array) -> Array:
        """uint8 [M, T, H, W, 3], bool [M, T] -> visual tokens [M, R, D]."""
        return self.resample(self.encode_images(images), frame_mask)

    def prepare_media(self, visual_tokens: Array) -> Media:
        """Every gated block's keys and values, once per visual: leaves [blocks, M, R, H, d]."""
        graph, state = nnx.split(self.gated_xattn.layers)
        return jax.lax.map(lambda s: nnx.merge(graph, s).project_visuals(visual_tokens), state)

    def __call__(
        self, tokens: Array, positions: Array, segments: Array, media_index: Array, visual_tokens: Array | None, visuals: Array | None,
        *, rows_own_visuals: bool = False,
    ) -> Array:
        """Packed rows -> logits float32 [B, L, V + extra].

        Args:
          tokens, positions, segments, media_index: int32 [B, L].
          visual_tokens: [M, R, D] of `encode_visuals`, or None: the text is read with every visual taken away.
          visuals: int32 [B, N], each row's visuals as places in M, -1 for none.
          rows_own_visuals: M = B * N and row b's visuals stand at b * N + n (as training batches have it), so that none need be gathered:
            the gradient of a gather is a scatter, slow on every backend.
        """
        mask = None
        if visual_tokens is not None:
            assert visuals is not None
            mask = media_mask(media_index, segments, visuals, visual_tokens.shape[1], self.config.attend)
        gathered = None if rows_own_visuals else visuals

        def block(gated: GatedCrossAttentionBlock, x: Array, _: Any) -> Array:
            media = None if visual_tokens is None else gated.project_visuals(visual_tokens)
            return gated.attend(x, media, gathered, mask)

        def layer(decoder: Any, x: Array, cache: None) -> tuple[Array, None]:
            return decoder(x, positions, segments, cache)

        x, _ = self._groups(self._embed(tokens), None, block, layer, None)
        return self._logits(x)

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """An empty cache; every leaf has the batch at axis 1."""
        return self.language_model.init_cache(batch, max_length)

    def decode(
        self, tokens: Array, positions: Array, media_index: Array, media: Media | None, visuals: Array | None, cache: Cache
    ) -> tuple[Array, Cache]:
        """Some tokens more of each row -> logits float32 [B, L, V + extra] and the cache with them.

        A cache slot is a position; a token at position max_length is padding: it is dropped and its logits mean nothing.
        `media` comes from `prepare_media`; None reads the text with every visual taken away.
        """
        mask = None
        if media is not None:
            assert visuals is not None
            mask = media_mask(media_index, None, visuals, media.key.shape[2], self.config.attend)

        def block(gated: GatedCrossAttentionBlock, x: Array, block_media: Media | None) -> Array:
            return gated.attend(x, block_media, visuals, mask)

        def layer(decoder: Any, x: Array, layer_cache: Cache) -> tuple[Array, Cache]:
            return decoder(x, positions, None, layer_cache)

        x, cache = self._groups(self._embed(tokens), cache, block, layer, media)
        return self._logits(x), cache

    def _groups(self, x: Array, cache: Any, block: Any, layer: Any, block_inputs: Any) -> tuple[Array, Any]:
        """Scans over groups of one gated block and `every` language model layers, of which the last group may lack some.

        The language model stays one flat stack that each step indexes, since the depth need not be a multiple of `every`
        (the 80B model's 80 layers are 11 groups of 7 and one of 3) and slicing a frozen stack would copy it.
        """
        blocks_graph, blocks = nnx.split(self.gated_xattn.layers)
        layers_graph, layers = nnx.split(self.language_model.layers)
        depth, every = self.config.language_model.layers, self.config.every

        def one_layer(carry: Any, index: Array) -> Any:
            x, cache = carry
            take = lambda tree: jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, 0, keepdims=False), tree)
            x, new = layer(nnx.merge(layers_graph, take(layers)), x, take(cache))
            put = lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, index, 0)
            return x, jax.tree.map(put, cache, new)

        def one_group(carry: Any, inputs: Any) -> tuple[Any, None]:
            x, cache = carry
            number, block_state, block_input = inputs
            carry = block(nnx.merge(blocks_graph, block_state), x, block_input), cache

            def step(carry: Any, offset: Array) -> tuple[Any, None]:
                index = number * every + offset
                if depth % every == 0:
                    return one_layer(carry, index), None
                return jax.lax.cond(index < depth, lambda c: one_layer(c, index), lambda c: c, carry), None

            return (step(carry, jnp.int32(0)) if every == 1 else jax.lax.scan(step, carry, jnp.arange(every)))[0], None

        count = math.ceil(depth / every)
        return jax.lax.scan(one_group, (x, cache), (jnp.arange(count), blocks, block_inputs))[0]

    def _embed(self, tokens: Array) -> Array:
        vocabulary = self.config.language_model.vocab_size
        frozen = self.language_model.embed(jnp.minimum(tokens, vocabulary - 1))
        extra = self.extra_embedding[...].astype(self.dtype) * self.config.language_model.embedding_scale
        return jnp.where((tokens >= vocabulary)[..., None], extra[jnp.maximum(tokens - vocabulary, 0)], frozen)

    def _logits(self, x: Array) -> Array:
        # Concatenated after the frozen product: one product with more columns changes the other columns' last bits.
        frozen = self.language_model.logits(x)
        extra = linear(self.language_model.final_norm(x), self.extra_embedding[...].T).astype(jnp.float32)
        return jnp.concatenate([frozen, extra], axis=-1)
