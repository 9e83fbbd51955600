"""Reads Mistral (Jiang et al. 2023): Llama with grouped queries and, in version 0.1, a sliding
window.
"""

from flamingo_jax.experiment import LanguageModelConfig
from flamingo_jax.interop.documents import Document
from flamingo_jax.interop.families.llama import llama_family, llama_like, sliding_window

KV_HEADS, WINDOW = 8, 4096
"""Defaults of transformers' class for keys that config.json lacks; a null means "none"."""


def parse(config: Document, _: Document) -> LanguageModelConfig:
    """Translates Mistral's config.json."""
    config.require("attention_bias", False)
    silent = not config.has("sliding_window")
    window = 0
    if silent or config.given("sliding_window") is not None:
        window = sliding_window(config, WINDOW, first=0)
    return llama_like(config, kv_heads=KV_HEADS, window=window)


FAMILY = llama_family("mistral", parse)
