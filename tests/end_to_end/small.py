"""Small stages on a small synthetic world, as a config file
(`--config=tests/end_to_end/small.py:STAGE,DATA`) and as Experiments.
"""

import dataclasses
import pathlib

import ml_collections

from data_pipelines.build.synthetic_world import VOCABULARY
from flamingo_jax.configuring import to_config
from flamingo_jax.experiment import (
    AttentionConfig,
    ConditioningConfig,
    ContrastiveConfig,
    DatasetConfig,
    Experiment,
    FeedForwardConfig,
    FlamingoConfig,
    LanguageModelConfig,
    OptimizerConfig,
    ResamplerConfig,
    TextEncoderConfig,
    TrainingConfig,
    VisionConfig,
)

VISION = VisionConfig(variant="tiny", image_size=32)
LANGUAGE_MODEL = LanguageModelConfig(
    vocab_size=VOCABULARY,
    layers=2,
    width=16,
    attention=AttentionConfig(heads=2, head_width=8),
    feed_forward=FeedForwardConfig(width=32),
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, weight_decay_exclude=())
TRAINING = TrainingConfig(
    steps=30,
    log_every=1,
    save_every=3,
    keep_last=2,
    evaluate_every=1000,
    compute_dtype="float32",
)


def get_config(argument: str) -> ml_collections.ConfigDict:
    stage, _, data = argument.partition(",")
    stages = {
        "contrastive": contrastive,
        "language_model": language_model,
        "flamingo": flamingo,
        "questions": questions,
        "unfrozen": unfrozen,
        "pages": pages,
    }
    return to_config(stages[stage](pathlib.Path(data)))


def contrastive(data: pathlib.Path, **changes: object) -> Experiment:
    text = TextEncoderConfig(vocab_size=VOCABULARY, layers=1, width=16, heads=2, max_length=24)
    return _experiment(
        data,
        changes,
        task="contrastive",
        contrastive=ContrastiveConfig(vision=VISION, text=text, joint_width=16),
        data={"ltip": DatasetConfig("pairs", str(data / "ltip"), batch_size=8)},
    )


def language_model(data: pathlib.Path, **changes: object) -> Experiment:
    return _experiment(
        data,
        changes,
        task="language_modelling",
        language_model=LANGUAGE_MODEL,
        data={"text": DatasetConfig("text", str(data / "text"), batch_size=8, max_length=32)},
    )


def flamingo(data: pathlib.Path, **changes: object) -> Experiment:
    """The Flamingo on all four datasets, on untrained frozen parts unless exports are named."""
    return _experiment(
        data,
        changes,
        task="flamingo",
        flamingo=FlamingoConfig(
            vision=VISION,
            language_model=LANGUAGE_MODEL,
            resampler=ResamplerConfig(
                layers=1, width=16, heads=2, head_width=8, latents=2, frames=4, feed_forward=32
            ),
            conditioning=ConditioningConfig(
                heads=2,
                head_width=8,
                feed_forward=32,
            ),
        ),
        data={
            "m3w": DatasetConfig(
                "pages",
                str(data / "m3w"),
                batch_size=8,
                max_length=64,
                visuals=2,
                weight=1.0,
                p_next=0.5,
            ),
            "align": DatasetConfig(
                "pairs", str(data / "align"), batch_size=8, max_length=48, visuals=2, weight=0.2
            ),
            "ltip": DatasetConfig(
                "pairs",
                str(data / "ltip"),
                batch_size=8,
                max_length=48,
                visuals=2,
                weight=0.2,
                colour=0.2,
            ),
            "vtp": DatasetConfig(
                "videos",
                str(data / "vtp"),
                batch_size=8,
                max_length=48,
                visuals=1,
                frames=4,
                weight=0.03,
            ),
        },
        vision_encoder_from="random",
        language_model_from="random",
    )


def questions(data: pathlib.Path, **changes: object) -> Experiment:
    """The Flamingo on questions alone, several to a row."""
    asked = DatasetConfig(
        "questions", str(data / "vqa"), split="test", batch_size=8, max_length=64, visuals=2
    )
    return dataclasses.replace(flamingo(data, **changes), data={"vqa": asked})


def pages(data: pathlib.Path, **changes: object) -> Experiment:
    """The Flamingo on pages alone, which compiles in a quarter of the time."""
    experiment = flamingo(data, **changes)
    return dataclasses.replace(experiment, data={"m3w": experiment.data["m3w"]})


def unfrozen(data: pathlib.Path, **changes: object) -> Experiment:
    """The same with the vision encoder trained, two of a device's images at a time."""
    training = dataclasses.replace(TRAINING, unfreeze_vision_encoder=True, frames_at_once=2)
    return questions(data, **({"training": training} | changes))


def _experiment(folder: pathlib.Path, changes: dict[str, object], **options: object) -> Experiment:
    shared: dict[str, object] = {
        "name": "small",
        "tokenizer": str(folder / "tokenizer"),
        "optimizer": OPTIMIZER,
        "training": TRAINING,
    }
    return Experiment(**(shared | options | changes))  # type: ignore[arg-type]
