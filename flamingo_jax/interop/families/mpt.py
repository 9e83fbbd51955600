"""Reads MPT (MosaicML 2023): ALiBi, no biases, not even in LayerNorm, tied embeddings.

OpenFlamingo-3B and -9B use MPT-1B and MPT-7B.
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
from flamingo_jax.interop.families.family import Family, TensorTable
from flamingo_jax.interop.families.llama import require_divides

LAYER = "transformer.blocks.{}."
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
EXPANSION = 4
"""Expansion of the feed-forward, which is hard-coded in transformers' class."""


def table(config: LanguageModelConfig) -> TensorTable:
    """Returns the table of tensors. Queries, keys and values are one tensor [3 x width,
    width], one below the other.
    """
    width = config.width

    def rows(place: int) -> tuple[Term, ...]:
        # The last part takes all remaining rows, which also checks the size of the tensor.
        taken = None if place == 2 else width
        name, form = LAYER + "attn.Wqkv.weight", "(h d) w -> w h d"
        return (Term(name, form, first=place * width, taken=taken),)

    return {
        "embedding": (Term(EMBEDDING),),
        "head": (Term(HEAD, "v w -> w v"),),
        "final_norm/scale": (Term("transformer.norm_f.weight"),),
        "layers/attention_norm/scale": (Term(LAYER + "norm_1.weight"),),
        "layers/attention/query": rows(0),
        "layers/attention/key": rows(1),
        "layers/attention/value": rows(2),
        "layers/attention/out": (Term(LAYER + "attn.out_proj.weight", "w (h d) -> h d w"),),
        "layers/feed_forward_norm/scale": (Term(LAYER + "norm_2.weight"),),
        "layers/feed_forward/up": (Term(LAYER + "ffn.up_proj.weight", "f w -> w f"),),
        "layers/feed_forward/down": (Term(LAYER + "ffn.down_proj.weight", "w f -> f w"),),
    }


def parse(config: Document, _: Document) -> LanguageModelConfig:
    """Translates MPT's config.json."""
    config.require("quantization_config")
    config.require("no_bias", True)
    config.require("expansion_ratio", EXPANSION)
    config.require("logit_scale")
    config.require("embedding_fraction", 1, 1.0)
    attention = config.inside("attn_config")
    attention.require("alibi", True)
    attention.require("attn_type", "multihead_attention")
    attention.require("prefix_lm", False)
    attention.require("qk_ln", False)
    for key in ("clip_qkv", "softmax_scale"):
        attention.require(key)
    width, heads = config.integer("d_model"), config.integer("n_heads")
    require_divides(config, "n_heads", heads, "d_model", width)
    return LanguageModelConfig(
        vocab_size=config.integer("vocab_size"),
        layers=config.integer("n_layers"),
        width=width,
        norm=NormConfig("layer", config.number("layer_norm_epsilon", 1e-5), bias=False),
        positions=PositionsConfig("alibi", slope_range=attention.number("alibi_bias_max", 8.0)),
        attention=AttentionConfig(heads=heads, head_width=width // heads),
        feed_forward=FeedForwardConfig(EXPANSION * width, activation="exact_gelu"),
        tied_embeddings=config.given("tie_word_embeddings") is not False,
    )


FAMILY = Family(
    "mpt",
    "language_model",
    parse,
    table,
    prefix="transformer.",
    embedding=EMBEDDING,
    head=HEAD,
)
