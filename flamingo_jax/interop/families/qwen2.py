"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from flamingo_jax.experiment import LanguageModelConfig
from flamingo_jax.interop.documents import Document
from flamingo_jax.interop.families.llama import llama_family, llama_like, sliding_window

KV_HEADS, FIRST_WINDOW = 32, 28
"""What transformers' class has where a config.json is silent."""


def qwen_window(config: Document) -> int:
    """How far back a token sees: only where use_sliding_window says so."""
    if config.given("sliding_window") is None or not config.given("use_sliding_window"):
        return 0
    return sliding_window(config, first=config.integer("max_window_layers", FIRST_WINDOW, least=0))


def parse(config: Document, _: Document) -> LanguageModelConfig:
    """Qwen2's config.json. What it says of attention_bias, transformers do not read."""
    return llama_like(config, kv_heads=KV_HEADS, bias=True, window=qwen_window(config))


FAMILY = llama_family("qwen2", parse)
