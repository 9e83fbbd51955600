"""What a decoder language model is made of, as a config: norms, positions, attention,
feed-forward, and how a layer adds them up.

Every family that can be read (`flamingo_jax.interop.families`) is a setting of these fields.
"""

import dataclasses
from typing import Literal

from flamingo_jax.ranges import AboveZero, Count, NotNegative, Positive, Several, Shrinking


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """The norm before each half of a layer and before the head."""

    kind: Literal["rms", "layer"] = "rms"
    """rms: root mean square with a scale (Chinchilla, Llama). layer: mean and variance (GPT-NeoX,
    MPT, OPT).
    """
    eps: AboveZero = 1e-6
    """Added to the mean square or the variance."""
    bias: bool = True
    """layer: a bias beside the scale (MPT has none)."""


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """Rotary frequencies stretched for longer texts than a model was first trained on."""

    kind: Literal["linear", "llama3"] = "llama3"
    """linear: all frequencies by `factor`; llama3: low ones by `factor`, high ones not at all,
    and those between in part.
    """
    factor: AboveZero = 8.0
    """How many times longer the waves become."""
    low_frequency_factor: AboveZero = 1.0
    """llama3: waves longer than original_length / this are low frequencies."""
    high_frequency_factor: AboveZero = 4.0
    """llama3: waves shorter than original_length / this are high ones."""
    original_length: Positive = 8192
    """Tokens that the model was first trained on."""


@dataclasses.dataclass(frozen=True)
class PositionsConfig:
    """How attention knows where a token stands; each field belongs to the kinds it names."""

    kind: Literal["transformer_xl", "rotary", "alibi", "learned"] = "transformer_xl"
    """transformer_xl: learned maps of sinusoidal distances (Dai et al. 2019; Chinchilla). rotary:
    queries and keys turn with their position (Su et al. 2021; Llama, GPT-NeoX). alibi: a penalty
    that grows with the distance (Press et al. 2022; MPT). learned: a vector for each position is
    added to the embedding (OPT).
    """
    bias_init: NotNegative = 0.0
    """transformer_xl: deviation of the position bias v at the start. Away from 0, some heads
    prefer some distances from the first step on, and copying in context, which needs a head
    that looks one token back, emerges sooner in a small model.
    """
    base: AboveZero = 10_000.0
    """rotary: the longest wave is 2 pi times as many positions."""
    fraction: Shrinking = 1.0
    """rotary: the share of each head's width, from its first value on, that turns (GPT-NeoX)."""
    scaling: RotaryScaling | None = None
    """rotary: frequencies of a model whose context was made longer."""
    slope_range: AboveZero = 8.0
    """alibi: the gentlest head's slope is 2 to the minus this (MPT's alibi_bias_max)."""
    max_length: Several = 2048
    """learned: positions that have a vector; no text can be longer."""


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The attention half of a layer."""

    heads: Positive = 16
    """Of queries."""
    kv_heads: Count = 0
    """Heads of keys and values, each shared by heads / kv_heads queries (grouped-query
    attention); 0 for as many as queries.
    """
    head_width: Positive = 128
    """Width of a head's queries, keys and values."""
    bias: bool = False
    """Biases on queries, keys and values (Qwen2, GPT-NeoX, OPT)."""
    out_bias: bool = False
    """A bias on the map out of the heads (GPT-NeoX, OPT)."""
    query_key_norm: Literal["none", "head", "width"] = "none"
    """A norm of the model's kind over queries and keys, before positions turn them. head: over
    each head by itself (Qwen3). width: over all heads together (MPT with qk_ln).
    """
    window: Count = 0
    """A token sees itself and this many less one before it (Mistral 7B of 2023: 4096); 0 for
    all before it.
    """


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig:
    """The feed-forward half of a layer."""

    width: Positive = 8192
    """Hidden units."""
    activation: Literal["gelu", "exact_gelu", "squared_relu", "relu", "silu"] = "gelu"
    """gelu: the tanh form. exact_gelu: by the error function (GPT-NeoX, MPT)."""
    gated: bool = False
    """down(activation(gate(x)) * up(x)), SwiGLU with `activation` silu (Llama)."""
    bias: bool = False
    """Biases on both maps (GPT-NeoX, OPT)."""


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """Decoder language model.

    The defaults are the Chinchilla form; open families are settings of the same layer.
    """

    vocab_size: Positive = 32_000
    """Pieces of the tokenizer."""
    layers: Positive = 24
    """Decoder layers."""
    width: Positive = 2048
    """Of the residual stream."""
    norm: NormConfig = NormConfig()
    positions: PositionsConfig = PositionsConfig()
    attention: AttentionConfig = AttentionConfig()
    feed_forward: FeedForwardConfig = FeedForwardConfig()
    residual: Literal["sequential", "parallel", "parallel_one_norm"] = "sequential"
    """sequential: attention, then feed-forward of their sum. parallel: both read the layer's
    input, each by a norm of its own (GPT-NeoX); parallel_one_norm: by the same norm (GPT-J).
    """
    tied_embeddings: bool = True
    """The head is the input embeddings, transposed."""
    embedding_scale: AboveZero = 1.0
    """Input embeddings are multiplied by this.

    Small ones beside what attention writes let copying in context emerge sooner.
    """


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Training a frozen language model by updates of low rank beside its matrices (Hu et al.
    2021).
    """

    rank: Count = 0
    """Of every update, the width of what lies between its two factors, 8 or so; 0 for none: the
    language model stays as it is.
    """
    alpha: AboveZero = 16.0
    """An update is multiplied by alpha / rank, so that the rate need not follow the rank."""
    targets: tuple[str, ...] = ("attention/(query|value)",)
    """Regular expressions over a layer's matrices, attention/(query|key|value|out) and
    feed_forward/(gate|up|down), that get an update; by default the paper's choice.
    """
