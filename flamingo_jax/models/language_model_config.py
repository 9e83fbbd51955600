"""The config of a decoder language model: norm, positions, attention, feed-forward and
residual form.

Every family that can be loaded (`flamingo_jax.interop.families`) is a setting of these fields.
"""

import dataclasses
from typing import Literal

from flamingo_jax.ranges import (
    AboveZero,
    AtLeastTwo,
    Count,
    NotNegative,
    Positive,
    PositiveFraction,
)


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """The norm before each half of a layer and before the head."""

    kind: Literal["rms", "layer"] = "rms"
    """rms: root mean square with a scale (Chinchilla, Llama). layer: mean and variance
    (GPT-NeoX, MPT, OPT).
    """
    eps: AboveZero = 1e-6
    """Added to the mean square or the variance."""
    bias: bool = True
    """layer: a bias beside the scale (MPT has none)."""


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """Scaling of rotary frequencies, for longer texts than a model was first trained on."""

    kind: Literal["linear", "llama3"] = "llama3"
    """linear: all frequencies are divided by `factor`; llama3: low ones are, high ones are
    not, and those between in part.
    """
    factor: AboveZero = 8.0
    """Factor by which wavelengths grow."""
    low_frequency_factor: AboveZero = 1.0
    """llama3: waves longer than original_length / this are low frequencies."""
    high_frequency_factor: AboveZero = 4.0
    """llama3: waves shorter than original_length / this are high ones."""
    original_length: Positive = 8192
    """Context length, in tokens, that the model was first trained with."""


@dataclasses.dataclass(frozen=True)
class PositionsConfig:
    """The positional encoding; each field belongs to the kinds that it names."""

    kind: Literal["transformer_xl", "rotary", "alibi", "learned"] = "transformer_xl"
    """transformer_xl: learned maps of sinusoidal distances (Dai et al. 2019; Chinchilla).
    rotary: queries and keys are rotated by their position (Su et al. 2021; Llama, GPT-NeoX).
    alibi: a penalty that grows with the distance (Press et al. 2022; MPT). learned: a vector
    for each position is added to the embedding (OPT).
    """
    bias_init: NotNegative = 0.0
    """transformer_xl: initial standard deviation of the position bias v. Above 0, heads prefer
    different distances from the first step on, and in-context copying, which needs a head that
    attends one token back, emerges sooner in a small model.
    """
    base: AboveZero = 10_000.0
    """rotary: the base of the frequencies (rope_theta); the longest wavelength is about 2 pi
    times this many positions.
    """
    fraction: PositiveFraction = 1.0
    """rotary: the share of each head's width that is rotated, from its first value on
    (GPT-NeoX).
    """
    scaling: RotaryScaling | None = None
    """rotary: scaling of the frequencies, for a model whose context was extended."""
    slope_range: AboveZero = 8.0
    """alibi: the smallest slope of a head is 2 to the minus this (MPT's alibi_bias_max)."""
    max_length: AtLeastTwo = 2048
    """learned: the size of the position table; no text can be longer."""


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The attention half of a layer."""

    heads: Positive = 16
    """Query heads."""
    kv_heads: Count = 0
    """Key-value heads, each shared by heads / kv_heads query heads (grouped-query attention);
    0 for as many as query heads.
    """
    head_width: Positive = 128
    """Width of a head's queries, keys and values."""
    bias: bool = False
    """Biases on queries, keys and values (Qwen2, GPT-NeoX, OPT)."""
    out_bias: bool = False
    """A bias on the output projection (GPT-NeoX, OPT)."""
    query_key_norm: Literal["none", "head", "width"] = "none"
    """A norm of the model's kind on queries and keys, before rotary positions. head: over each
    head separately (Qwen3). width: over all heads together (MPT with qk_ln).
    """
    window: Count = 0
    """Sliding window: a token attends to this many tokens, itself the last (Mistral 7B of
    2023: 4096); 0 for all before it.
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
    """A decoder language model. The defaults are Chinchilla's architecture."""

    vocab_size: Positive = 32_000
    """Pieces of the tokenizer."""
    layers: Positive = 24
    """Decoder layers."""
    width: Positive = 2048
    """Width of the residual stream."""
    norm: NormConfig = NormConfig()
    positions: PositionsConfig = PositionsConfig()
    attention: AttentionConfig = AttentionConfig()
    feed_forward: FeedForwardConfig = FeedForwardConfig()
    residual: Literal["sequential", "parallel", "parallel_one_norm"] = "sequential"
    """sequential: attention, then feed-forward of its result. parallel: both of the layer's
    input, each with its own norm (GPT-NeoX). parallel_one_norm: both with the same norm
    (GPT-J).
    """
    tied_embeddings: bool = True
    """The output head is the transposed input embedding."""
    embedding_scale: AboveZero = 1.0
    """Factor on the input embeddings.

    In-context copying emerges sooner if they are small compared with attention's output.
    """


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank updates of a frozen language model's matrices (LoRA, Hu et al. 2021)."""

    rank: Count = 0
    """Rank of every update, such as 8; 0 for no LoRA."""
    alpha: AboveZero = 16.0
    """An update is multiplied by alpha / rank, so that the learning rate need not depend on
    the rank.
    """
    targets: tuple[str, ...] = ("attention/(query|value)",)
    """Regular expressions of the matrices that get an update, among
    attention/(query|key|value|out) and feed_forward/(gate|up|down); by default those of the
    LoRA paper.
    """
