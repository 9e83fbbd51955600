"""Reads OPT (Zhang et al. 2022): LayerNorm, learned positions, ReLU, biases, tied embeddings.

Only pre-norm models are supported, which are all sizes except 350M.
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
from flamingo_jax.interop.families.family import Family, TensorTable, attention, norm
from flamingo_jax.interop.families.llama import require_divides

LAYER = "model.decoder.layers.{}."
EMBEDDING, HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"
ACTIVATIONS = {"relu": "relu", "gelu": "exact_gelu", "gelu_new": "gelu"}
OFFSET = 2
"""Row of the position embedding that the first token uses: fairseq reserves the rows before
it.
"""
TABLE: TensorTable = {
    "embedding": (Term(EMBEDDING),),
    "position_embedding": (Term("model.decoder.embed_positions.weight", first=OFFSET),),
    "head": (Term(HEAD, "v w -> w v"),),
    **norm("final_norm", "model.decoder.final_layer_norm"),
    **norm("layers/attention_norm", LAYER + "self_attn_layer_norm"),
    **attention("query", LAYER + "self_attn.q_proj"),
    **attention("key", LAYER + "self_attn.k_proj"),
    **attention("value", LAYER + "self_attn.v_proj"),
    "layers/attention/out": (Term(LAYER + "self_attn.out_proj.weight", "w (h d) -> h d w"),),
    "layers/attention/out_bias": (Term(LAYER + "self_attn.out_proj.bias"),),
    **norm("layers/feed_forward_norm", LAYER + "final_layer_norm"),
    "layers/feed_forward/up": (Term(LAYER + "fc1.weight", "f w -> w f"),),
    "layers/feed_forward/up_bias": (Term(LAYER + "fc1.bias"),),
    "layers/feed_forward/down": (Term(LAYER + "fc2.weight", "w f -> f w"),),
    "layers/feed_forward/down_bias": (Term(LAYER + "fc2.bias"),),
}


def parse(config: Document, _: Document) -> LanguageModelConfig:
    """Translates OPT's config.json."""
    config.require("quantization_config")
    config.require("do_layer_norm_before", True)
    config.require("_remove_final_layer_norm", False)
    config.require("enable_bias", True)
    config.require("layer_norm_elementwise_affine", True)
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    config.require("word_embed_proj_dim", width)
    require_divides(config, "num_attention_heads", heads, "hidden_size", width)
    return LanguageModelConfig(
        vocab_size=config.integer("vocab_size"),
        layers=config.integer("num_hidden_layers"),
        width=width,
        norm=NormConfig("layer", 1e-5),
        positions=PositionsConfig(
            "learned", max_length=config.integer("max_position_embeddings", 2048)
        ),
        attention=AttentionConfig(heads=heads, head_width=width // heads, bias=True, out_bias=True),
        feed_forward=FeedForwardConfig(
            config.integer("ffn_dim"),
            activation=config.choice("activation_function", ACTIVATIONS, "relu"),
            bias=True,
        ),
        tied_embeddings=config.given("tie_word_embeddings") is not False,
    )


FAMILY = Family(
    "opt",
    "language_model",
    parse,
    lambda config: TABLE,
    prefix="model.",
    embedding=EMBEDDING,
    head=HEAD,
)
