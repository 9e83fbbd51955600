"""Flamingo-style visual language models in JAX (Alayrac et al. 2022).

    import flamingo_jax as fj

    model = fj.load("runs/quickstart/flamingo/export")
    print(model.generate([fj.Image("a.png"), "Output:"]).text)

Names are imported lazily, at first use, so that `import flamingo_jax` is fast and does not
initialise any device.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flamingo_jax.errors import UserError
    from flamingo_jax.experiment import (
        ConditioningConfig,
        FlamingoConfig,
        MeshConfig,
        ResamplerConfig,
        VisionConfig,
        ViTConfig,
    )
    from flamingo_jax.inference.completion import Completion
    from flamingo_jax.inference.model import CandidateScores, Model, load
    from flamingo_jax.inference.prompts import END_OF_CHUNK
    from flamingo_jax.inference.scheduler import StreamedToken
    from flamingo_jax.inference.streaming import TextStream
    from flamingo_jax.interop.load import load_language_model, load_vision_encoder
    from flamingo_jax.models.flamingo import Flamingo
    from flamingo_jax.models.language_model import LanguageModel
    from flamingo_jax.models.language_model_config import (
        AttentionConfig,
        FeedForwardConfig,
        LanguageModelConfig,
        NormConfig,
        PositionsConfig,
        RotaryScaling,
    )
    from flamingo_jax.partitioning.mesh import make_mesh
    from flamingo_jax.processing.tokenizer import Tokenizer
    from flamingo_jax.processing.visuals import Image, Video

__version__ = "0.1.0"

__all__ = [
    "END_OF_CHUNK",
    "AttentionConfig",
    "CandidateScores",
    "Completion",
    "ConditioningConfig",
    "FeedForwardConfig",
    "Flamingo",
    "FlamingoConfig",
    "Image",
    "LanguageModel",
    "LanguageModelConfig",
    "MeshConfig",
    "Model",
    "NormConfig",
    "PositionsConfig",
    "ResamplerConfig",
    "RotaryScaling",
    "StreamedToken",
    "TextStream",
    "Tokenizer",
    "UserError",
    "ViTConfig",
    "Video",
    "VisionConfig",
    "load",
    "load_language_model",
    "load_vision_encoder",
    "make_mesh",
]

_HOMES = {
    "errors": ["UserError"],
    "experiment": [
        "ConditioningConfig",
        "FlamingoConfig",
        "MeshConfig",
        "ResamplerConfig",
        "VisionConfig",
        "ViTConfig",
    ],
    "inference.completion": ["Completion"],
    "inference.model": ["CandidateScores", "Model", "load"],
    "inference.prompts": ["END_OF_CHUNK"],
    "inference.scheduler": ["StreamedToken"],
    "inference.streaming": ["TextStream"],
    "interop.load": ["load_language_model", "load_vision_encoder"],
    "models.flamingo": ["Flamingo"],
    "models.language_model": ["LanguageModel"],
    "models.language_model_config": [
        "AttentionConfig",
        "FeedForwardConfig",
        "LanguageModelConfig",
        "NormConfig",
        "PositionsConfig",
        "RotaryScaling",
    ],
    "partitioning.mesh": ["make_mesh"],
    "processing.tokenizer": ["Tokenizer"],
    "processing.visuals": ["Image", "Video"],
}
"""{module: its public names}, the same as above."""
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
