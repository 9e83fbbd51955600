"""Small models of every family whose weights anyone can make again: a tensor's values follow
from its name and shape.

`fixtures/` holds what transformers' PyTorch modules make of them; see make_fixtures.py.
"""

import json
import pathlib
import zlib
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
LENGTHS = (1, 7, 40)
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 101,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "patch_size": 8,
}
MPT: dict[str, Any] = {
    "model_type": "mpt",
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "expansion_ratio": 4,
    "max_seq_len": 512,
    "vocab_size": 101,
    "no_bias": True,
}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "llama": TEXT | {"model_type": "llama"},
    # Tied, all heads their own keys, a vocabulary padded to a multiple of 64.
    "llama3": (
        TEXT
        | {
            "model_type": "llama",
            "num_key_value_heads": 4,
            "vocab_size": 128,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3,
        }
    ),
    "llama_linear": (
        TEXT
        | {
            "model_type": "llama",
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
        }
    ),
    "mistral": (
        TEXT
        | {
            "model_type": "mistral",
            "head_dim": 16,
            "sliding_window": 9,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        }
    ),
    "qwen2": (
        TEXT | {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 1}
    ),
    # A window in every layer, longer than what the model was trained on.
    "qwen2_window": (
        TEXT
        | {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 0,
            "max_position_embeddings": 8,
        }
    ),
    "qwen3": (
        TEXT
        | {
            "model_type": "qwen3",
            "head_dim": 16,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        }
    ),
    # Half of each head turns, both halves of a layer read the same state.
    "gpt_neox": (
        TEXT
        | {
            "model_type": "gpt_neox",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.5,
            },
        }
    ),
    # RedPajama-INCITE: one half after the other, whole heads turn.
    "gpt_neox_sequential": (
        TEXT
        | {
            "model_type": "gpt_neox",
            "use_parallel_residual": False,
            "hidden_act": "gelu_new",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 1.0,
            },
        }
    ),
    "mpt": MPT,
    # Alibi's slopes of a number of heads that is no power of two.
    "mpt_six_heads": MPT | {"d_model": 48, "n_heads": 6},
    "opt": (
        TEXT
        | {
            "model_type": "opt",
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
        }
    ),
}
VISION_ENCODERS: dict[str, dict[str, Any]] = {
    "clip": {
        "model_type": "clip_vision_model",
        "image_size": 32,
        "hidden_act": "quick_gelu",
        **TOWER,
    },
    "clip_gelu": {
        "model_type": "clip_vision_model",
        "image_size": 16,
        "hidden_act": "gelu",
        **TOWER,
    },
    # 30 pixels are three patches of 8 and a rest.
    "siglip": {"model_type": "siglip_vision_model", "image_size": 30, **TOWER},
}


def values(name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Weights that keep activations near 1, scales near 1."""
    # Its sequence of numbers is the same in every version of numpy.
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        return (float("norm" in name and name.endswith("weight")) + 0.2 * noise).astype(dtype)
    fan_in = 1 if "embed" in name and "patch" not in name else np.prod(shape[1:])
    return (noise * fan_in**-0.5).astype(dtype)


def fixture(case: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(config.json, {tensor: shape}) as transformers save them."""
    content = json.loads((FIXTURES / f"{case}.json").read_text())
    return content["config"], {name: tuple(shape) for name, shape in content["tensors"].items()}


def outputs(case: str) -> dict[str, np.ndarray]:
    """Inputs and outputs of transformers' module, float32."""
    with np.load(FIXTURES / f"{case}.npz") as found:
        return dict(found)


def write_folder(
    folder: pathlib.Path,
    config: dict[str, Any],
    tensors: dict[str, tuple[int, ...]],
    files: int = 1,
    dtype: Any = np.float32,
) -> pathlib.Path:
    """A checkpoint of one file, or an index of several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    arrays = {name: values(name, shape, dtype) for name, shape in tensors.items()}
    if files == 1:
        save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {
            name: array
            for place, (name, array) in enumerate(arrays.items())
            if place % files == number
        }
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def tokens(case: str, vocabulary: int) -> list[np.ndarray]:
    """One text of each length."""
    draw = np.random.RandomState(zlib.crc32(case.encode()))
    return [
        draw.randint(0, vocabulary, length).astype(np.int32)
        for length in (*LENGTHS, *((200,) if case == "llama3" else ()))
    ]


def images(case: str, size: int) -> np.ndarray:
    """Normalised images float32 [2, S, S, 3]."""
    return (
        np.random.RandomState(zlib.crc32(case.encode()))
        .standard_normal((2, size, size, 3))
        .astype(np.float32)
    )


OTHER_SIZES = {"clip": 44, "clip_gelu": 40, "siglip": 20}
"""Sides of images that an encoder's stored positions are stretched or shrunk for."""
GRIDS = ((4, 4), (6, 6), (3, 3), (5, 7), (2, 9), (1, 1))
"""Grids that a table of 4 x 4 positions is brought to."""


def positions() -> dict[str, np.ndarray]:
    """A table [4, 4, 8], what torch interpolates it to, and features of `OTHER_SIZES`, float32."""
    with np.load(FIXTURES / "positions.npz") as found:
        return dict(found)
