"""Decoder language model: RMSNorm before each part, relative or rotary positions, tied or
separate embeddings.

Its default is the Chinchilla form: Gopher and Chinchilla (Rae et al. 2021, Hoffmann et al.
2022) use RMSNorm, Transformer-XL positions and GELU. Its parameters are 13 D^2 a layer (12 of
attention and feed-forward, 1 of the relative positions) and one embedding: the counts of the
paper's table.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from flamingo_jax.experiment import LanguageModelConfig
from flamingo_jax.models.attention import Cache, SelfAttention, Shared, distance_keys
from flamingo_jax.models.layers import (
    FeedForward,
    RMSNorm,
    fan_in_normal,
    linear,
    save_for_backward,
    scan_layers,
    stack,
)
from flamingo_jax.models.packing import Parts
from flamingo_jax.partitioning.constraints import all_gather, reduce_scatter, residual

Array = jax.Array


class DecoderLayer(nnx.Module):
    """x += SelfAttention(Norm(x)); x += FeedForward(Norm(x))."""

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs):
        # Each of the 2 * layers residual branches starts small, so that the sum over depth
        # keeps its scale.
        branch = 1 / math.sqrt(2 * config.layers)
        self.attention_norm = RMSNorm(config.width, config.norm.eps)
        self.attention = SelfAttention(config, out_scale=branch, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config.width, config.norm.eps)
        self.feed_forward = FeedForward(
            config.width,
            config.feed_forward.width,
            config.feed_forward.activation,
            gated=config.feed_forward.gated,
            rngs=rngs,
        )
        self.feed_forward.down[...] *= branch

    def __call__(
        self,
        x: Array,
        positions: Array | Parts,
        segments: Array | Parts | None,
        cache: Cache | None,
        between: Callable[[Array], Array] | None = None,
    ) -> tuple[Array, Cache | None]:
        """x [B, L, D]; positions, segments int32 [B, L], or those of every part of a stream; a
        cache means decoding (see SelfAttention). between: what is done to x between the two.
        """
        h, cache = self.attention(all_gather(self.attention_norm(x)), positions, segments, cache)
        x = save_for_backward(residual(x + reduce_scatter(h)))
        if between is not None:
            x = between(x)
        return (
            residual(x + reduce_scatter(self.feed_forward(all_gather(self.feed_forward_norm(x))))),
            cache,
        )


def empty_cache(
    layers: Any, config: LanguageModelConfig, batch: int, max_length: int, dtype: DTypeLike
) -> Cache:
    """Makes an empty cache for a stack of decoder layers; leaves [layers, B, max_length, H, d],
    H being the heads of keys and values.

    Transformer-XL's keys of distances, [layers, max_length, H, d], are in it from the start:
    they are as dear to compute as the language model itself is for dozens of tokens.
    """
    attention = config.attention
    count = layers.attention_norm.scale.shape[0]
    heads = attention.kv_heads or attention.heads
    empty = jnp.zeros((count, batch, max_length, heads, attention.head_width), dtype)
    if config.positions.kind != "transformer_xl":
        return Cache(empty, empty)
    position = layers.attention.position[...]
    keys = jax.lax.map(lambda w: distance_keys(w, max_length, dtype), position)
    return Cache(empty, empty, Shared(keys))


class LanguageModel(nnx.Module):
    """tokens -> logits. `layers` is one stack of equal DecoderLayers."""

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        remat: str = "none",
    ):
        self.config = config
        self.dtype = dtype
        self.remat = remat
        self.embedding = fan_in_normal(rngs, (config.vocab_size, config.width), config.width)
        self.layers = stack(lambda r: DecoderLayer(config, rngs=r), config.layers, rngs)
        self.final_norm = RMSNorm(config.width, config.norm.eps)
        self.head = (
            None
            if config.tied_embeddings
            else fan_in_normal(rngs, (config.width, config.vocab_size))
        )

    def embed(self, tokens: Array) -> Array:
        """int32 [B, L] -> [B, L, D]."""
        return self.embedding[...][tokens].astype(self.dtype) * self.config.embedding_scale

    def logits(self, x: Array) -> Array:
        """Last hidden states [B, L, D] -> float32 [B, L, V]."""
        w = self.embedding[...].T if self.head is None else self.head[...]
        return linear(self.final_norm(x), w).astype(jnp.float32)

    def __call__(self, tokens: Array, positions: Array, segments: Array) -> Array:
        """Packed rows int32 [B, L] (segment 0 is padding) -> logits float32 [B, L, V]."""
        return self.logits(self.run_layers(self.embed(tokens), positions, segments))

    def run_layers(self, x: Array, positions: Array, segments: Array) -> Array:
        """Embeddings [B, L, D] -> last hidden states [B, L, D]."""
        return scan_layers(
            self.layers,
            lambda layer, x, _: (layer(x, positions, segments, None)[0], None),
            x,
            None,
            self.remat,
        )[0]

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """An empty cache for all layers: see `empty_cache`."""
        return empty_cache(self.layers, self.config, batch, max_length, self.dtype)

    def decode(self, tokens: Array, positions: Array, cache: Cache) -> tuple[Array, Cache]:
        """Some tokens more of each row: int32 [B, L] at their positions (padding: max_length)
        -> logits [B, L, V], cache.
        """

        def body(layer: DecoderLayer, x: Array, layer_cache: Cache) -> tuple[Array, Cache]:
            x, new = layer(x, positions, None, layer_cache)
            assert new is not None
            return x, new._replace(distances=None)

        x, new = scan_layers(self.layers, body, self.embed(tokens), cache)
        return self.logits(x), new._replace(distances=cache.distances)
