"""Makes a Flamingo from its sizes alone, for `python -m launch.benchmark train --sizes=...`. A
PyTorch implementation can be built with the same sizes for comparison.

`--config=configs/benchmark.py:layers=4,width=256,heads=4,vocab=8192,xattn_every=1,vit_layers=4,...`
sets all of `NUMBERS` and `BATCHES`. The model has a language model of the GPT-NeoX
architecture (rotary positions, GELU, untied head), a ViT, a resampler of 6 layers, and
cross-attention with 8 heads of width 64.
"""

import dataclasses
import re
from typing import TYPE_CHECKING

from configs.base import arguments
from flamingo_jax.configuring import from_config, to_config
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import (
    AttentionConfig,
    ConditioningConfig,
    DatasetConfig,
    Experiment,
    FeedForwardConfig,
    FlamingoConfig,
    LanguageModelConfig,
    PositionsConfig,
    ResamplerConfig,
    TrainingConfig,
    VisionConfig,
    ViTConfig,
)

if TYPE_CHECKING:
    import ml_collections

NUMBERS = (
    "layers",
    "width",
    "heads",
    "vocab",
    "xattn_every",
    "vit_layers",
    "vit_width",
    "vit_heads",
    "image",
    "patch",
)
BATCHES = ("interleaved", "pairs")
"""Batch sizes, each as rows x images x tokens: 8x3x128."""
NUMBER = "[1-9][0-9]{0,8}"


def get_config(arg: str = "") -> "ml_collections.ConfigDict":
    """Returns the config of an argument like that of `experiment_of`."""
    return to_config(experiment_of(arg))


def experiment_of(sizes: str) -> Experiment:
    """Makes the experiment of comma-separated NAME=VALUE pairs.

    Raises: UserError for an unknown or missing name, or a malformed value.
    """
    given = arguments(sizes, "benchmark", (*NUMBERS, *BATCHES))
    if missing := [name for name, value in given.items() if not value]:
        raise UserError(
            f"sizes: {missing[0]!r} is missing; it takes {', '.join((*NUMBERS, *BATCHES))}"
        )
    for name, value in given.items():
        form, example = ("x".join([NUMBER] * 3), "8x3x128") if name in BATCHES else (NUMBER, "4")
        if not re.fullmatch(form, value):
            raise UserError(f"sizes: {name} is {value!r}, but must look like {example}")
    n = {name: int(given[name]) for name in NUMBERS}
    width, vision = n["width"], n["vit_width"]
    language_model = LanguageModelConfig(
        vocab_size=n["vocab"],
        layers=n["layers"],
        width=width,
        attention=AttentionConfig(heads=n["heads"], head_width=width // n["heads"], bias=True),
        feed_forward=FeedForwardConfig(width=4 * width),
        positions=PositionsConfig(kind="rotary"),
        tied_embeddings=False,
    )
    vit = ViTConfig(
        patch_size=n["patch"],
        layers=n["vit_layers"],
        width=vision,
        heads=n["vit_heads"],
        feed_forward=4 * vision,
    )
    (rows, images, tokens), (pair_rows, pair_images, pair_tokens) = (
        [int(size) for size in given[name].split("x")] for name in BATCHES
    )
    experiment = Experiment(
        name="benchmark",
        flamingo=FlamingoConfig(
            vision=VisionConfig(image_size=n["image"], vit=vit),
            language_model=language_model,
            resampler=ResamplerConfig(
                layers=6, width=vision, heads=8, head_width=64, feed_forward=4 * vision
            ),
            conditioning=ConditioningConfig(
                xattn_every=n["xattn_every"],
                heads=8,
                head_width=64,
                feed_forward=4 * width,
            ),
        ),
        data={
            "m3w": DatasetConfig("pages", batch_size=rows, visuals=images, max_length=tokens),
            "pairs": DatasetConfig(
                "pairs",
                batch_size=pair_rows,
                visuals=pair_images,
                max_length=pair_tokens,
                weight=0.2,
            ),
        },
        training=TrainingConfig(compute_dtype="float32"),
        vision_encoder_from="random",
        language_model_from="random",
    )
    return from_config(Experiment, dataclasses.asdict(experiment), "sizes")


def sized(gigabytes: float) -> Experiment:
    """Makes the experiment of a model whose export takes about so many gigabytes, of which a
    quarter is trained.
    """
    # With a cross-attention block in float32 for every fourth layer in bfloat16, a layer takes
    # 35 width^2 bytes; the width is one that gives some tens of layers.
    width = 64 * max(1, round((gigabytes * 1e9 / (35 * 30)) ** 0.5 / 64))
    vocabulary = 32 * width
    layers = max(4, round((gigabytes * 1e9 - 4 * vocabulary * width) / (35 * width**2)))
    sizes = {
        "layers": layers,
        "width": width,
        "heads": max(1, width // 64),
        "vocab": vocabulary,
        "xattn_every": 4,
        **dict.fromkeys(("vit_layers", "vit_heads"), 2),
        "vit_width": 128,
        "image": 32,
        "patch": 16,
        **dict.fromkeys(BATCHES, "1x1x32"),
    }
    experiment = experiment_of(",".join(f"{name}={value}" for name, value in sizes.items()))
    training = dataclasses.replace(experiment.training, compute_dtype="bfloat16")
    return dataclasses.replace(experiment, training=training)
