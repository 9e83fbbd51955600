r"""A small Flamingo on one's own images, pages, clips and text: copy this file and change it.

    python -m launch.train --config=configs/own_data.py:contrastive,runs/mine \
        --workdir=runs/mine/contrastive

and then `:language_model` and `:flamingo`, each exported to `<folder>/<stage>/export` before
the next (README). The folder has `data/` with what `launch.build_data` made: `pairs`, `pages`,
`videos`, `text` and `tokenizer`. Sizes suit two CPU cores and a few thousand records; what to
raise first on an accelerator is said at each number.
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
"""The size of the tokenizer (`launch.build_data sentencepiece --vocab_size=2048`); the
paper has 32,000.
"""
VISION = VisionConfig(variant="tiny", image_size=64)
"""On an accelerator: variant F0 and 288 px upwards."""
LANGUAGE_MODEL = LanguageModelConfig(
    vocab_size=VOCABULARY,
    layers=4,
    width=128,
    attention=AttentionConfig(heads=4, head_width=32),
    feed_forward=FeedForwardConfig(width=512),
)
STEPS = {"contrastive": 300, "language_model": 500, "flamingo": 400}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one stage, by default the Flamingo: `stage,root`."""
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
        # The paper sums over a sequence; beside long pages, short captions would then hardly
        # count.
        loss="token_mean",
    )


def _optimizer(**changes: object) -> OptimizerConfig:
    # A short run wants a higher rate than the paper's 1e-4, and one that falls to 0.
    short = {"learning_rate": 1e-3, "warmup_steps": 30, "schedule": "cosine", "beta2": 0.98}
    return OptimizerConfig(**(short | changes))  # type: ignore[arg-type]


def _contrastive(folder: str) -> Experiment:
    """One dataset of pairs; with several, each update takes a batch of every one (paper B.1.3)."""
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
    """Pages, pairs and clips with the paper's weights; the pairs stand for ALIGN and LTIP
    together.
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
            # Gates that start at 0, as the paper's do, hardly open in a run this short.
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
