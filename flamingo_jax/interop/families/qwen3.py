"""Reads Qwen3 (Yang et al. 2025): Llama with an RMSNorm over each head's queries and keys."""

from flamingo_jax.experiment import LanguageModelConfig
from flamingo_jax.interop.documents import Document
from flamingo_jax.interop.families.llama import llama_family, llama_like
from flamingo_jax.interop.families.qwen2 import KV_HEADS, qwen_window


def parse(config: Document, _: Document) -> LanguageModelConfig:
    """Translates Qwen3's config.json."""
    bias = bool(config.given("attention_bias"))
    return llama_like(
        config,
        kv_heads=KV_HEADS,
        bias=bias,
        out_bias=bias,
        query_key_norm=True,
        window=qwen_window(config),
    )


FAMILY = llama_family("qwen3", parse)
