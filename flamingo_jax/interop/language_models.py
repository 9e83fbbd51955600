"""Llama, Mistral, Qwen2 and Qwen3 as transformers publish them: their configs and the table of
their tensors.
"""

import re

from flamingo_jax.checkpointing.tensors import Term
from flamingo_jax.experiment import (
    AttentionConfig,
    FeedForwardConfig,
    LanguageModelConfig,
    NormConfig,
    PositionsConfig,
    RotaryScaling,
)
from flamingo_jax.interop.documents import Document

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type`."""

KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}

LAYER = "model.layers.{}."
TABLE: dict[str, tuple[Term, ...]] = {
    "embedding": (Term("model.embed_tokens.weight"),),
    "head": (Term("lm_head.weight", "v w -> w v"),),
    "final_norm/scale": (Term("model.norm.weight"),),
    "layers/attention_norm/scale": (Term(LAYER + "input_layernorm.weight"),),
    "layers/attention/query": (Term(LAYER + "self_attn.q_proj.weight", "(h d) w -> w h d"),),
    "layers/attention/key": (Term(LAYER + "self_attn.k_proj.weight", "(h d) w -> w h d"),),
    "layers/attention/value": (Term(LAYER + "self_attn.v_proj.weight", "(h d) w -> w h d"),),
    "layers/attention/out": (Term(LAYER + "self_attn.o_proj.weight", "w (h d) -> h d w"),),
    "layers/attention/query_bias": (Term(LAYER + "self_attn.q_proj.bias", "(h d) -> h d"),),
    "layers/attention/key_bias": (Term(LAYER + "self_attn.k_proj.bias", "(h d) -> h d"),),
    "layers/attention/value_bias": (Term(LAYER + "self_attn.v_proj.bias", "(h d) -> h d"),),
    "layers/attention/query_norm/scale": (Term(LAYER + "self_attn.q_norm.weight"),),
    "layers/attention/key_norm/scale": (Term(LAYER + "self_attn.k_norm.weight"),),
    "layers/feed_forward_norm/scale": (Term(LAYER + "post_attention_layernorm.weight"),),
    "layers/feed_forward/gate": (Term(LAYER + "mlp.gate_proj.weight", "f w -> w f"),),
    "layers/feed_forward/up": (Term(LAYER + "mlp.up_proj.weight", "f w -> w f"),),
    "layers/feed_forward/down": (Term(LAYER + "mlp.down_proj.weight", "w f -> f w"),),
}
"""Our stacked names -> the tensors; {} stands for the layer's number.

A model has those that its config asks for.
"""

PREFIX = "model."
"""Is missing from all names where the model was saved without its head."""
FREQUENCIES = r".*rotary_emb\.inv_freq"
"""Of the rotary positions: says nothing that the config does not, as long as it is the
config's.
"""
EMBEDDING, HEAD = TABLE["embedding"][0].name, TABLE["head"][0].name


def parse(config: Document) -> LanguageModelConfig:
    """A config.json as our config; a UserError for what the model here cannot do."""
    family = config.choice("model_type", {name: name for name in FAMILIES}, None)
    config.require("hidden_act", "silu", "swish")
    config.require("mlp_bias", False)
    config.require("quantization_config")
    if family != "qwen2":
        # In transformers it speaks of the output map as well, which has none here.
        config.require("attention_bias", False)
    config.require("partial_rotary_factor", 1, 1.0)
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if config.given("head_dim") is None and width % heads:
        config.refuse("hidden_size", f"a multiple of num_attention_heads ({heads})")
    # null is for as many as queries; where it is not there at all, transformers have a number
    # of their own.
    shared = config.integer(
        "num_key_value_heads",
        heads if config.has("num_key_value_heads") else KV_HEADS.get(family, heads),
    )
    if heads % shared:
        config.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    head_width = config.integer("head_dim", width // heads)
    if head_width % 2:
        config.refuse("head_dim", "an even number")
    base, scaling = _rotary(config)
    tied = config.given("tie_word_embeddings")
    return LanguageModelConfig(
        vocab_size=config.integer("vocab_size"),
        layers=config.integer("num_hidden_layers"),
        width=width,
        attention=AttentionConfig(
            heads=heads,
            head_width=head_width,
            kv_heads=0 if shared == heads else shared,
            bias=family == "qwen2",
            window=_window(config, family),
            query_key_norm="head" if family == "qwen3" else "none",
        ),
        feed_forward=FeedForwardConfig(
            width=config.integer("intermediate_size"), activation="silu", gated=True
        ),
        positions=PositionsConfig(kind="rotary", base=base, scaling=scaling),
        norm=NormConfig(eps=config.number("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(tied),
    )


def harmless(config: LanguageModelConfig) -> tuple[str, ...]:
    """Regular expressions for the surplus tensors of such a model that are left unread, if
    `content` finds in them what the config says too.
    """
    return (FREQUENCIES, *([re.escape(HEAD)] if config.tied_embeddings else []))


def _rotary(config: Document) -> tuple[float, RotaryScaling | None]:
    """The base and the scaling; both stand in rope_parameters since transformers 5."""
    given = config.inside("rope_parameters" if config.given("rope_parameters") else "rope_scaling")
    base = given.number("rope_theta", config.number("rope_theta", 10_000.0))
    given.require("partial_rotary_factor", 1, 1.0)
    kind = given.given("rope_type") or given.given("type") or "default"
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, RotaryScaling("linear", given.number("factor"))
    if kind == "llama3":
        return base, RotaryScaling(
            "llama3",
            given.number("factor"),
            given.number("low_freq_factor"),
            given.number("high_freq_factor"),
            given.integer("original_max_position_embeddings"),
        )
    given.refuse(
        "rope_type" if given.given("rope_type") else "type", "'default', 'linear' or 'llama3'"
    )


def _window(config: Document, family: str) -> int:
    """How far back a token sees, 0 for to the beginning; the same in all layers.

    A window as long as the texts that a model was trained on is one all the same: longer texts
    can be read.
    """
    size = (
        config.given("sliding_window")
        if config.has("sliding_window") or family != "mistral"
        else 4096
    )
    if (
        size is None
        or family == "llama"
        or (family != "mistral" and not config.given("use_sliding_window"))
    ):
        return 0
    layers, kinds = config.integer("num_hidden_layers"), config.given("layer_types")
    first = 0 if family == "mistral" else config.integer("max_window_layers", 28, least=0)
    sliding = (
        [kind == "sliding_attention" for kind in kinds]
        if isinstance(kinds, list)
        else [layer >= first for layer in range(layers)]
    )
    if not any(sliding):
        return 0
    if not all(sliding):
        config.refuse(
            "layer_types" if kinds else "max_window_layers",
            "a sliding window in all layers or in none",
        )
    return config.integer("sliding_window", size)
