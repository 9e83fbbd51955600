r"""Trains a small Flamingo on your own images, pages, clips and text: copy this file and
change it.

    python -m launch.train --config=configs/own_data.py:contrastive,runs/mine \
        --workdir=runs/mine/contrastive

then `:language_model` and `:flamingo`. Export each stage to `<folder>/<stage>/export` before
the next one starts (data_pipelines/README.md has all commands). The folder has `data/` with
the datasets that `launch.build_data` made: `pairs`, `pages`, `videos`, `text` and `tokenizer`.
The sizes are for two CPU cores and a few thousand records.
"""

import ml_collections

from configs.base import held_out, stage_of
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

VOCABULARY = 2048
"""Size of the tokenizer (`launch.build_data sentencepiece --vocab_size=2048`); the paper's has
32,000.
"""
VISION = VisionConfig(variant="tiny", image_size=64)
"""On an accelerator, use variant F0 or larger and at least 288 px."""
LANGUAGE_MODEL = LanguageModelConfig(
    vocab_size=VOCABULARY,
    layers=4,
    width=128,
    attention=AttentionConfig(heads=4, head_width=32),
    feed_forward=FeedForwardConfig(width=512),
)
STEPS = {"contrastive": 300, "language_model": 500, "flamingo": 400}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of the argument `stage,root`, by default the Flamingo's."""
    return to_config(stage_of(arg, "own_data", STAGES, "runs/mine"))


def _training(stage: str) -> TrainingConfig:
    steps = STEPS[stage]
    return TrainingConfig(
        steps=steps,
        log_every=10,
        evaluate_every=100,
        evaluate_batches=2,
        save_every=100,
        compute_dtype="float32",
        # The paper sums over the tokens of a sequence, with which short captions would hardly
        # count beside long pages.
        loss="token_mean",
    )


def _optimizer(**changes: object) -> OptimizerConfig:
    # A short run needs a higher learning rate than the paper's 1e-4, and one that falls to 0.
    short = {"learning_rate": 1e-3, "warmup_steps": 30, "schedule": "cosine", "beta2": 0.98}
    return OptimizerConfig(**(short | changes))  # type: ignore[arg-type]


def _contrastive(folder: str) -> Experiment:
    """Trains the vision encoder on pairs. With several datasets, each update takes a batch of
    each (paper B.1.3).
    """
    return Experiment(
        name="contrastive",
        task="contrastive",
        contrastive=ContrastiveConfig(
            vision=VISION,
            text=TextEncoderConfig(
                vocab_size=VOCABULARY, layers=2, width=128, heads=4, max_length=48
            ),
            joint_width=128,
            initial_temperature=0.1,
            merge_duplicates=True,
        ),
        tokenizer=f"{folder}/data/tokenizer",
        data={
            "pairs": DatasetConfig(
                kind="pairs", path=f"{folder}/data/pairs", batch_size=128, flip=True, colour=0.1
            )
        },
        optimizer=_optimizer(weight_decay_exclude=()),
        training=_training("contrastive"),
    )


def _language_model(folder: str) -> Experiment:
    data = {
        "text": DatasetConfig(
            kind="text", path=f"{folder}/data/text", batch_size=16, max_length=128
        )
    }
    return Experiment(
        name="language model",
        task="language_modelling",
        language_model=LANGUAGE_MODEL,
        tokenizer=f"{folder}/data/tokenizer",
        data=data,
        held_out=held_out(data),
        optimizer=_optimizer(weight_decay_exclude=()),
        training=_training("language_model"),
    )


def _flamingo(folder: str) -> Experiment:
    """Trains the Flamingo on pages, pairs and clips with the paper's weights; the weight of
    pairs is the sum of those of ALIGN and LTIP.
    """
    data = {
        "pages": DatasetConfig(
            kind="pages",
            path=f"{folder}/data/pages",
            batch_size=4,
            max_length=256,
            visuals=5,
            weight=1.0,
            p_next=0.5,
        ),
        "pairs": DatasetConfig(
            kind="pairs",
            path=f"{folder}/data/pairs",
            batch_size=8,
            max_length=64,
            visuals=4,
            weight=0.4,
        ),
        "videos": DatasetConfig(
            kind="videos",
            path=f"{folder}/data/videos",
            batch_size=2,
            max_length=64,
            visuals=3,
            frames=8,
            weight=0.03,
        ),
    }
    return Experiment(
        name="flamingo",
        task="flamingo",
        flamingo=FlamingoConfig(
            vision=VISION,
            language_model=LANGUAGE_MODEL,
            resampler=ResamplerConfig(
                layers=2,
                width=128,
                heads=4,
                head_width=32,
                latents=16,
                frames=8,
                feed_forward=512,
            ),
            # With the paper's initial value of 0, the gates would hardly open in such a short
            # run.
            conditioning=ConditioningConfig(
                heads=4,
                head_width=32,
                feed_forward=512,
                gate_init=1.0,
                out_scale=0.3,
            ),
        ),
        tokenizer=f"{folder}/data/tokenizer",
        data=data,
        held_out=held_out(data),
        optimizer=_optimizer(),
        training=_training("flamingo"),
        vision_encoder_from=f"{folder}/contrastive/export",
        language_model_from=f"{folder}/language_model/export",
    )


STAGES = {
    "contrastive": _contrastive,
    "language_model": _language_model,
    "flamingo": _flamingo,
}
