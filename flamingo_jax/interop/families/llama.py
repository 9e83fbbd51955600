"""Reads Llama 1 to 3 and models saved in its format (Touvron et al. 2023): RMSNorm, rotary
positions, SwiGLU.

Mistral, Qwen2 and Qwen3 have the same tensors and nearly the same config: see `llama_like`.
"""

from collections.abc import Callable
from typing import Any, NoReturn

from flamingo_jax.checkpointing.stored_tensors import Term
from flamingo_jax.experiment import (
    AttentionConfig,
    FeedForwardConfig,
    LanguageModelConfig,
    NormConfig,
    PositionsConfig,
    RotaryScaling,
)
from flamingo_jax.interop.documents import Document
from flamingo_jax.interop.families.family import Family, TensorTable

LAYER = "model.layers.{}."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLE: TensorTable = {
    "embedding": (Term(EMBEDDING),),
    "head": (Term(HEAD, "v w -> w v"),),
    "final_norm/scale": (Term("model.norm.weight"),),
    "layers/attention_norm/scale": (Term(LAYER + "input_layernorm.weight"),),
    "layers/attention/query": (Term(LAYER + "self_attn.q_proj.weight", "(h d) w -> w h d"),),
    "layers/attention/key": (Term(LAYER + "self_attn.k_proj.weight", "(h d) w -> w h d"),),
    "layers/attention/value": (Term(LAYER + "self_attn.v_proj.weight", "(h d) w -> w h d"),),
    "layers/attention/out": (Term(LAYER + "self_attn.o_proj.weight", "w (h d) -> h d w"),),
    "layers/attention/query_bias": (Term(LAYER + "self_attn.q_proj.bias", "(h d) -> h d"),),
    "layers/attention/key_bias": (Term(LAYER + "self_attn.k_proj.bias", "(h d) -> h d"),),
    "layers/attention/value_bias": (Term(LAYER + "self_attn.v_proj.bias", "(h d) -> h d"),),
    "layers/attention/out_bias": (Term(LAYER + "self_attn.o_proj.bias"),),
    "layers/attention/query_norm/scale": (Term(LAYER + "self_attn.q_norm.weight"),),
    "layers/attention/key_norm/scale": (Term(LAYER + "self_attn.k_norm.weight"),),
    "layers/feed_forward_norm/scale": (Term(LAYER + "post_attention_layernorm.weight"),),
    "layers/feed_forward/gate": (Term(LAYER + "mlp.gate_proj.weight", "f w -> w f"),),
    "layers/feed_forward/up": (Term(LAYER + "mlp.up_proj.weight", "f w -> w f"),),
    "layers/feed_forward/down": (Term(LAYER + "mlp.down_proj.weight", "w f -> f w"),),
}
FREQUENCIES = r".*rotary_emb\.inv_freq"
"""Stored rotary frequencies, which the config implies (`content.differing` checks that they
agree).
"""


def llama_like(
    config: Document,
    *,
    kv_heads: int | None = None,
    bias: bool = False,
    out_bias: bool = False,
    query_key_norm: bool = False,
    window: int = 0,
) -> LanguageModelConfig:
    """Translates a config.json with Llama's keys; the switches are those of `AttentionConfig`.

    kv_heads: default of num_key_value_heads if the key is absent; None for the number of
    heads, which a null means in every family.

    Raises: UserError for a setting that the language model here does not support.
    """
    config.require("hidden_act", "silu", "swish")
    config.require("mlp_bias", False)
    config.require("quantization_config")
    config.require("partial_rotary_factor", 1, 1.0)
    config.inside("rope_parameters").require("partial_rotary_factor", 1, 1.0)
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if config.given("head_dim") is None:
        require_divides(config, "num_attention_heads", heads, "hidden_size", width)
    # Number of key and value heads, fewer than query heads with grouped queries.
    shared = config.integer(
        "num_key_value_heads",
        heads if config.has("num_key_value_heads") or kv_heads is None else kv_heads,
    )
    if heads % shared:
        config.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    head_width = config.integer("head_dim", width // heads)
    if head_width % 2:
        config.refuse("head_dim", "an even number")
    base, scaling = rotary(config)
    return LanguageModelConfig(
        vocab_size=config.integer("vocab_size"),
        layers=config.integer("num_hidden_layers"),
        width=width,
        norm=NormConfig("rms", config.number("rms_norm_eps", 1e-6)),
        positions=PositionsConfig("rotary", base=base, scaling=scaling),
        attention=AttentionConfig(
            heads=heads,
            kv_heads=0 if shared == heads else shared,
            head_width=head_width,
            bias=bias,
            out_bias=out_bias,
            query_key_norm="head" if query_key_norm else "none",
            window=window,
        ),
        feed_forward=FeedForwardConfig(
            config.integer("intermediate_size"), activation="silu", gated=True
        ),
        tied_embeddings=bool(config.given("tie_word_embeddings")),
    )


def require_divides(config: Document, divisor: str, count: int, key: str, value: int) -> None:
    """Raises UserError if `count`, the value of `divisor`, does not divide the value of
    `key`.
    """
    if value % count:
        config.refuse(key, f"a multiple of {divisor} ({count})")


def rotary(config: Document, default: float = 10_000.0) -> tuple[float, RotaryScaling | None]:
    """Returns base and scaling of the rotary frequencies; transformers 5 moved both keys into
    rope_parameters.
    """
    given = config.inside("rope_parameters" if config.given("rope_parameters") else "rope_scaling")
    base = given.number("rope_theta", config.number("rope_theta", default))
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
    refuse_kind(given)


def refuse_kind(given: Document) -> NoReturn:
    """Raises UserError for a kind of RoPE scaling that is not supported."""
    key = "rope_type" if given.given("rope_type") else "type"
    given.refuse(key, "'default', 'linear' or 'llama3'")


def sliding_window(config: Document, default: int | None = None, *, first: int) -> int:
    """Returns the sliding window in tokens, the same in all layers; 0 for full attention.

    default: if sliding_window is absent. first: the first layer with a window, if layer_types
    is absent. A window as long as the training texts still counts, since longer texts can be
    read.

    Raises: UserError if only some layers have a window.
    """
    layers, kinds = config.integer("num_hidden_layers"), config.given("layer_types")
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
    return config.integer("sliding_window", default)


def llama_family(model_type: str, parse: Callable[[Document, Document], Any]) -> Family:
    """Makes a family that has Llama's tensors."""
    return Family(
        model_type,
        "language_model",
        parse,
        lambda config: TABLE,
        prefix="model.",
        unread=(FREQUENCIES,),
        embedding=EMBEDDING,
        head=HEAD,
    )


def parse(config: Document, _: Document) -> LanguageModelConfig:
    """Translates Llama's config.json."""
    bias = bool(config.given("attention_bias"))
    return llama_like(config, bias=bias, out_bias=bias)


FAMILY = llama_family("llama", parse)
