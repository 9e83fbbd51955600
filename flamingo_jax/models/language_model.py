"""Decoder language model: embeddings, a stack of decoder layers, a final norm and a head, tied
to the embedding or separate.

By default it is Chinchilla (Hoffmann et al. 2022, after Gopher, Rae et al. 2021): RMSNorm,
Transformer-XL positions and GELU. It then has 13 D^2 parameters per layer (12 in attention and
feed-forward, 1 in the relative positions) plus one embedding, which gives the parameter counts
of the paper's table.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from flamingo_jax.experiment import LanguageModelConfig
from flamingo_jax.models.cache import LINE, Cache, SharedCache
from flamingo_jax.models.decoder import DecoderLayer
from flamingo_jax.models.language_model_config import LoRAConfig
from flamingo_jax.models.layers import (
    fan_in_normal,
    linear,
    lookup,
    make_norm,
    scan_layers,
    stack,
    unembed,
)
from flamingo_jax.models.packing import PackedText, Packing, pack
from flamingo_jax.models.weights import add_lora
from flamingo_jax.partitioning.constraints import constrain
from flamingo_jax.partitioning.mesh import MODEL, ROWS

Array = jax.Array


def empty_cache(
    layers: Any,
    config: LanguageModelConfig,
    batch: int,
    slots: int,
    dtype: DTypeLike,
    length: int | None = None,
) -> Cache:
    """Allocates the key-value cache of a stack of decoder layers; leaves
    [layers, B, K, slots, d], K being the key-value heads.

    Transformer-XL's keys of the distances, [layers, length, H, d], are computed here once: they
    cost as much as a forward pass of the language model over dozens of tokens.

    length: the positions of the longest row, by default as many as slots.
    """
    attention = config.attention
    count = layers.attention_norm.scale.shape[0]
    heads = attention.kv_heads or attention.heads
    empty = jnp.zeros((count, batch, heads, slots, attention.head_width), dtype)
    # Over `model` only where it divides the key-value heads.
    empty = constrain(empty, None, ROWS, MODEL)
    positions = layers.attention.positions
    distances = positions.cached_distances(layers.attention, length or slots, dtype)
    return Cache(empty, empty, None if distances is None else SharedCache(distances))


class LanguageModel(nnx.Module):
    """Maps tokens to next-token logits.

    `layers` is a single DecoderLayer whose parameters have a leading layer axis: see
    `layers.stack`.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        lora: LoRAConfig | None = None,
    ):
        self.config = config
        self.dtype = dtype
        self.remat = remat
        self.embedding: Any = fan_in_normal(rngs, (config.vocab_size, config.width), config.width)
        self.layers = stack(lambda r: DecoderLayer(config, rngs=r), config.layers, rngs)
        self.final_norm = make_norm(config.norm, config.width)
        self.head = (
            None
            if config.tied_embeddings
            else fan_in_normal(rngs, (config.width, config.vocab_size))
        )
        learned = config.positions.kind == "learned"
        self.position_embedding = (
            fan_in_normal(rngs, (config.positions.max_length, config.width), config.width)
            if learned
            else None
        )
        if lora is not None:
            add_lora(self.layers, lora, rngs)

    def embed(self, tokens: Array) -> Array:
        """Looks up token embeddings: int32 [B, L] -> [B, L, D], before `add_positions`."""
        return lookup(self.embedding, tokens).astype(self.dtype) * self.config.embedding_scale

    def add_positions(self, x: Array, positions: Array) -> Array:
        """Adds learned position embeddings to x [B, L, D], where the model has them.

        A position past the table gives NaN: clamping would silently reuse the last one.
        """
        if self.position_embedding is None:
            return x
        vectors = self.position_embedding[...].at[positions].get(mode="fill", fill_value=jnp.nan)
        return x + vectors.astype(self.dtype)

    def logits(self, x: Array) -> Array:
        """Applies the final norm and the head: hidden states [B, L, D] -> float32 [B, L, V]."""
        x = self.final_norm(x)
        h = unembed(x, self.embedding) if self.head is None else linear(x, self.head)
        return h.astype(jnp.float32)

    def __call__(self, tokens: Array, positions: Array, segments: Array) -> Array:
        """Computes the logits float32 [B, L, V] of packed rows, int32 [B, L]; segment 0 is
        padding.
        """
        return self.logits(self.hidden_states([PackedText(tokens, positions, segments)]))

    def hidden_states(self, texts: Sequence[PackedText]) -> Array:
        """Runs the forward pass on packed rows of one dataset or several -> last hidden states
        [S, T, D] of their stream, before the final norm.
        """
        stream = pack(texts)
        x = self.add_positions(self.embed(stream.tokens), stream.positions)
        return stream.restore(self.run_layers(x, stream.positions, stream.packing))

    def logit_parts(self, x: Array) -> tuple[Array, ...]:
        """Computes logits for the loss: hidden states [S, T, D] -> (float32 [S, T, V],), with
        V sharded over `model`. A tuple, since Flamingo's logits come in two parts.
        """
        return (constrain(self.logits(x), ROWS, None, MODEL),)

    def run_layers(self, x: Array, positions: Array, packing: Packing) -> Array:
        """Runs the decoder layers: x [S, T, D], positions int32 [S, T] -> [S, T, D]."""
        return scan_layers(
            self.layers,
            lambda layer, x, _: (layer(x, positions, packing, None)[0], None),
            x,
            None,
            self.remat,
        )[0]

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """Allocates a cache for all layers: see `empty_cache`."""
        return empty_cache(self.layers, self.config, batch, max_length, self.dtype)

    def decode(self, tokens: Array, positions: Array, cache: Cache) -> tuple[Array, Cache]:
        """Decodes L more tokens of each row, one for a step of generation or a whole prompt.

        Args:
          tokens, positions: int32 [B, L]; the position of padding is max_length.
          cache: keys and values of the tokens so far.

        Returns: logits float32 [B, L, V] and the cache with these tokens added.
        """

        def body(layer: DecoderLayer, x: Array, layer_cache: Cache) -> tuple[Array, Cache]:
            x, new = layer(x, positions, LINE, layer_cache)
            assert new is not None
            # No token changes the distances: as an output of the scan they would be copied.
            return x, new._replace(distances=None)

        x = self.add_positions(self.embed(tokens), positions)
        x, new = scan_layers(self.layers, body, x, cache)
        return self.logits(x), new._replace(distances=cache.distances)
