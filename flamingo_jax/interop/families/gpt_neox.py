"""Reads GPT-NeoX (Black et al. 2022), the architecture of Pythia and RedPajama-INCITE:
LayerNorm, rotary positions on a fraction of each head, biases, parallel or sequential
residual.

OpenFlamingo-4B uses RedPajama-INCITE-3B.
"""

from flamingo_jax.checkpointing.stored_tensors import Term
from flamingo_jax.experiment import (
    AttentionConfig,
    FeedForwardConfig,
    LanguageModelConfig,
    NormConfig,
    PositionsConfig,
)
from flamingo_jax.interop.documents import Document
from flamingo_jax.interop.families.family import Family, TensorTable, norm
from flamingo_jax.interop.families.llama import FREQUENCIES, require_divides, rotary

LAYER = "gpt_neox.layers.{}."
EMBEDDING, HEAD = "gpt_neox.embed_in.weight", "embed_out.weight"
ACTIVATIONS = {
    "gelu": "exact_gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
}


def _of_heads(place: int, bias: bool = False) -> tuple[Term, ...]:
    """Returns the query (`place` 0), key (1) or value (2) part of the fused QKV projection,
    whose output axis is (heads, 3, head width).
    """
    sizes, pick = {"part": 3}, {"part": place}
    if bias:
        name = LAYER + "attention.query_key_value.bias"
        return (Term(name, "(h part d) -> h d", sizes, pick=pick),)
    name = LAYER + "attention.query_key_value.weight"
    return (Term(name, "(h part d) w -> w h d", sizes, pick=pick),)


TABLE: TensorTable = {
    "embedding": (Term(EMBEDDING),),
    "head": (Term(HEAD, "v w -> w v"),),
    **norm("final_norm", "gpt_neox.final_layer_norm"),
    **norm("layers/attention_norm", LAYER + "input_layernorm"),
    "layers/attention/query": _of_heads(0),
    "layers/attention/key": _of_heads(1),
    "layers/attention/value": _of_heads(2),
    "layers/attention/query_bias": _of_heads(0, bias=True),
    "layers/attention/key_bias": _of_heads(1, bias=True),
    "layers/attention/value_bias": _of_heads(2, bias=True),
    "layers/attention/out": (Term(LAYER + "attention.dense.weight", "w (h d) -> h d w"),),
    "layers/attention/out_bias": (Term(LAYER + "attention.dense.bias"),),
    **norm("layers/feed_forward_norm", LAYER + "post_attention_layernorm"),
    "layers/feed_forward/up": (Term(LAYER + "mlp.dense_h_to_4h.weight", "f w -> w f"),),
    "layers/feed_forward/up_bias": (Term(LAYER + "mlp.dense_h_to_4h.bias"),),
    "layers/feed_forward/down": (Term(LAYER + "mlp.dense_4h_to_h.weight", "w f -> f w"),),
    "layers/feed_forward/down_bias": (Term(LAYER + "mlp.dense_4h_to_h.bias"),),
}


def parse(config: Document, _: Document) -> LanguageModelConfig:
    """Translates GPT-NeoX's config.json."""
    config.require("quantization_config")
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    require_divides(config, "num_attention_heads", heads, "hidden_size", width)
    base, scaling = rotary(config, config.number("rotary_emb_base", 10_000.0))
    # Rotary positions are applied to this fraction of each head.
    fraction = config.inside("rope_parameters").number(
        "partial_rotary_factor", config.number("rotary_pct", 0.25)
    )
    bias = config.given("attention_bias") is not False
    return LanguageModelConfig(
        vocab_size=config.integer("vocab_size"),
        layers=config.integer("num_hidden_layers"),
        width=width,
        norm=NormConfig("layer", config.number("layer_norm_eps", 1e-5)),
        positions=PositionsConfig("rotary", base=base, fraction=fraction, scaling=scaling),
        attention=AttentionConfig(heads=heads, head_width=width // heads, bias=bias, out_bias=bias),
        feed_forward=FeedForwardConfig(
            config.integer("intermediate_size"),
            activation=config.choice("hidden_act", ACTIVATIONS, "gelu"),
            bias=True,
        ),
        residual="sequential" if config.given("use_parallel_residual") is False else "parallel",
        tied_embeddings=bool(config.given("tie_word_embeddings")),
    )


FAMILY = Family(
    "gpt_neox",
    "language_model",
    parse,
    lambda config: TABLE,
    prefix="gpt_neox.",
    # Older versions of transformers save the causal mask.
    unread=(FREQUENCIES, r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias)"),
    embedding=EMBEDDING,
    head=HEAD,
)
