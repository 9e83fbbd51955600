"""Reads Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases on queries, keys and
values.
"""

from flamingo_jax.experiment import LanguageModelConfig
from flamingo_jax.interop.documents import Document
from flamingo_jax.interop.families.llama import llama_family, llama_like, sliding_window

KV_HEADS, FIRST_WINDOW = 32, 28
"""Defaults of transformers' class for keys that config.json lacks."""


def qwen_window(config: Document) -> int:
    """Returns the sliding window in tokens, 0 for none: it needs use_sliding_window as
    well.
    """
    if config.given("sliding_window") is None or not config.given("use_sliding_window"):
        return 0
    return sliding_window(config, first=config.integer("max_window_layers", FIRST_WINDOW, least=0))


def parse(config: Document, _: Document) -> LanguageModelConfig:
    """Translates Qwen2's config.json. Its attention_bias is ignored, as in transformers."""
    return llama_like(config, kv_heads=KV_HEADS, bias=True, window=qwen_window(config))


FAMILY = llama_family("qwen2", parse)
