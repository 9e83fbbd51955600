"""A tiny Flamingo whose heads divide over any mesh of eight devices, and what every method of a
model makes of some prompts.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flax import nnx

import flamingo_jax as fj
from flamingo_jax.checkpointing.export import export_model
from flamingo_jax.experiment import (
    AttentionConfig,
    ConditioningConfig,
    FeedForwardConfig,
    PositionsConfig,
    ResamplerConfig,
    VisionConfig,
    ViTConfig,
)
from flamingo_jax.pytrees import to_flat
from tests.inference.tiny_models import make_loaded, make_tokenizer, tiny_config

RNG = np.random.default_rng(0)
IMAGES = [fj.Image(RNG.integers(0, 255, (32, 32, 3), np.uint8)) for _ in range(3)]
CLIP = fj.Video(RNG.integers(0, 255, (3, 32, 32, 3), np.uint8))
PROMPTS: list[list[Any]] = [
    [IMAGES[0], "Output: a red circle", IMAGES[1], "Output:"],
    [IMAGES[1], "Question: what is this? Answer:"],
    [IMAGES[2], "Output:"],
]
CANDIDATES = [" a red star", " blue", " a dax is a wug at the top left"]


def model_of_eight_heads(kv_heads: int = 0, positions: str = "transformer_xl") -> Any:
    """Eight heads, so that `model` can take all eight devices."""
    language_model = dataclasses.replace(
        tiny_config(make_tokenizer().vocab_size).language_model,
        attention=AttentionConfig(heads=8, head_width=4, kv_heads=kv_heads),
        feed_forward=FeedForwardConfig(width=64),
        positions=PositionsConfig(kind=positions),
    )
    vit = ViTConfig(patch_size=16, layers=1, width=32, heads=2, feed_forward=64)
    return make_loaded(
        language_model=language_model,
        vision=VisionConfig(vit=vit, image_size=32),
        resampler=ResamplerConfig(
            layers=1, width=32, heads=8, head_width=4, latents=4, frames=4, feed_forward=64
        ),
        conditioning=ConditioningConfig(heads=8, head_width=4, feed_forward=64),
    )


def exported(
    loaded: Any, folder: pathlib.Path, parameters: dict[str, np.ndarray] | None = None
) -> pathlib.Path:
    """The export of a model; parameters: by default its own."""
    if parameters is None:
        flat = to_flat(nnx.split(loaded.model)[1])
        parameters = {name: np.asarray(value) for name, value in flat.items()}
    loaded.tokenizer.save(folder)
    export_model(
        folder / "export",
        kind="flamingo",
        config=dataclasses.asdict(loaded.config),
        parameters=parameters,
        tokenizer_file=folder / "tokenizer.model",
    )
    return folder / "export"


def _completions(made: Any) -> dict[str, Any]:
    completions = made if isinstance(made, list) else [made]
    return {
        "tokens": [list(one.tokens) for one in completions],
        "values": [one.score for one in completions],
    }


METHODS: dict[str, Callable[[fj.Model], dict[str, Any]]] = {
    "beams": lambda model: _completions(model.generate(PROMPTS, max_tokens=5)),
    "greedy": lambda model: _completions(model.generate(PROMPTS, max_tokens=5, beam_size=1)),
    "sampled": lambda model: _completions(
        model.generate(PROMPTS, max_tokens=5, temperature=1.3, top_p=0.9, seed=7)
    ),
    "without images": lambda model: _completions(
        model.generate(["a red"], max_tokens=3, beam_size=1)
    ),
    "a clip": lambda model: _completions(model.generate([CLIP, "Output:"], max_tokens=3)),
    "candidates": lambda model: {
        "values": [one.log_likelihoods for one in model.score(PROMPTS, CANDIDATES)]
    },
    "features": lambda model: {"values": model.features(IMAGES)},
    "logits": lambda model: {"values": model(PROMPTS[:1])},
}


def results(model: fj.Model, methods: Iterable[str] = tuple(METHODS)) -> dict[str, dict[str, Any]]:
    """What methods make of the prompts: token ids, and scores or other numbers."""
    return {name: METHODS[name](model) for name in methods}


def require_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """The same texts, and numbers within 1e-5 of one another."""
    for name, mine in found.items():
        assert mine.get("tokens") == wanted[name].get("tokens"), name
        np.testing.assert_allclose(
            mine["values"], wanted[name]["values"], rtol=1e-5, atol=1e-5, err_msg=name
        )
