"""Mistral (Jiang et al. 2023): Llama with grouped queries and, in 2023, a sliding window."""

from flamingo_jax.experiment import LanguageModelConfig
from flamingo_jax.interop.documents import Document
from flamingo_jax.interop.families.llama import llama_family, llama_like, sliding_window

KV_HEADS, WINDOW = 8, 4096
"""What transformers' class has where a config.json is silent; null means none of it."""


def parse(config: Document, _: Document) -> LanguageModelConfig:
    """Mistral's config.json."""
    config.require("attention_bias", False)
    silent = not config.has("sliding_window")
    window = 0
    if silent or config.given("sliding_window") is not None:
        window = sliding_window(config, WINDOW, first=0)
    return llama_like(config, kv_heads=KV_HEADS, window=window)


FAMILY = llama_family("mistral", parse)
