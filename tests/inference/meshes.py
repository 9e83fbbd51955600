"""A tiny Flamingo whose heads divide over any mesh of eight devices, and what every method of a
model makes of some prompts.
"""

import dataclasses
import pathlib
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
    [CLIP, "Question: what is this? Answer:"],
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


def exported(loaded: Any, folder: pathlib.Path) -> pathlib.Path:
    loaded.tokenizer.save(folder)
    export_model(
        folder / "export",
        kind="flamingo",
        config=dataclasses.asdict(loaded.config),
        parameters={k: np.asarray(v) for k, v in to_flat(nnx.split(loaded.model)[1]).items()},
        tokenizer_file=folder / "tokenizer.model",
    )
    return folder / "export"


def results(model: fj.Model) -> dict[str, Any]:
    """What every method makes of the prompts."""
    texts = {
        "greedy": model.generate(PROMPTS, max_tokens=5, beam_size=1),
        "beams": model.generate(PROMPTS, max_tokens=5),
        "sampled": model.generate(PROMPTS, max_tokens=5, temperature=1.3, top_p=0.9, seed=7),
        "words": model.generate(["a red"], max_tokens=3, beam_size=1),
    }
    found: dict[str, Any] = {"tokens": {}, "scores": {}}
    for name, made in texts.items():
        completions = made if isinstance(made, list) else [made]
        found["tokens"][name] = [list(one.tokens) for one in completions]
        found["scores"][name] = [one.score for one in completions]
    ranked = model.score(PROMPTS, CANDIDATES)
    found["scores"]["candidates"] = [one.log_likelihoods for one in ranked]
    found["features"] = model.features([*IMAGES, CLIP])
    found["logits"] = np.asarray(model(PROMPTS[:1]))
    return found


def require_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["tokens"] == wanted["tokens"]
    for name, scores in wanted["scores"].items():
        np.testing.assert_allclose(found["scores"][name], scores, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(found["features"], wanted["features"], atol=1e-5)
    np.testing.assert_allclose(found["logits"], wanted["logits"], atol=2e-5)
