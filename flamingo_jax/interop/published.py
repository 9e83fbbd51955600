"""Lists the config.json of some public models, so that a run can be planned without their
weights.
"""

import pathlib
from typing import Any

from flamingo_jax.interop import families
from flamingo_jax.interop.documents import Document

_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
_QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "use_sliding_window": False,
}

LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": (
        _LLAMA
        | {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "intermediate_size": 14_336,
            "tie_word_embeddings": False,
            "rope_scaling": _LLAMA3 | {"factor": 8.0},
        }
    ),
    "Llama-3.2-1B": (
        _LLAMA
        | {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "intermediate_size": 8192,
            "head_dim": 64,
            "tie_word_embeddings": True,
            "rope_scaling": _LLAMA3 | {"factor": 32.0},
        }
    ),
    "Mistral-7B-v0.1": {
        "model_type": "mistral",
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "max_position_embeddings": 32_768,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    },
    "Qwen2.5-0.5B": (
        _QWEN2
        | {
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
            "tie_word_embeddings": True,
        }
    ),
    "Qwen2.5-7B": (
        _QWEN2
        | {
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18_944,
            "tie_word_embeddings": False,
        }
    ),
    "Qwen3-0.6B": (
        _QWEN3
        | {
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "intermediate_size": 3072,
            "tie_word_embeddings": True,
        }
    ),
    "Qwen3-8B": (
        _QWEN3
        | {
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "intermediate_size": 12_288,
            "tie_word_embeddings": False,
        }
    ),
    "mpt-7b": {
        "model_type": "mpt",
        "vocab_size": 50_432,
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "expansion_ratio": 4,
        "max_seq_len": 2048,
        "no_bias": True,
        "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_type": "multihead_attention"},
    },
    "opt-1.3b": {
        "model_type": "opt",
        "vocab_size": 50_272,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "ffn_dim": 8192,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": 2048,
        "do_layer_norm_before": True,
        "activation_function": "relu",
    },
    "pythia-410m": {
        "model_type": "gpt_neox",
        "vocab_size": 50_304,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "hidden_act": "gelu",
        "rotary_pct": 0.25,
        "rotary_emb_base": 10_000,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    },
    "RedPajama-INCITE-Base-3B-v1": {
        "model_type": "gpt_neox",
        "vocab_size": 50_432,
        "hidden_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 10_240,
        "hidden_act": "gelu",
        "rotary_pct": 1.0,
        "rotary_emb_base": 10_000,
        "use_parallel_residual": False,
        "tie_word_embeddings": False,
    },
}

VISION_ENCODERS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14": {
        "model_type": "clip",
        "vision_config": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "image_size": 224,
            "patch_size": 14,
        },
    },
    "siglip-base-patch16-224": {
        "model_type": "siglip",
        "vision_config": {"model_type": "siglip_vision_model"},
    },
    "siglip-so400m-patch14-384": {
        "model_type": "siglip",
        "vision_config": {
            "hidden_size": 1152,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "intermediate_size": 4304,
            "image_size": 384,
            "patch_size": 14,
        },
    },
}


def published(name: str) -> Any:
    """Returns the config of a model listed above as LanguageModelConfig or VisionConfig, None
    for another name.
    """
    place = pathlib.Path(f"{name}/config.json")
    nothing = Document(place, {})
    if name in LANGUAGE_MODELS:
        return families.parse(Document(place, LANGUAGE_MODELS[name]), nothing, "language_model")
    if name in VISION_ENCODERS:
        return families.parse(Document(place, VISION_ENCODERS[name]), nothing, "vision_encoder")
    return None
