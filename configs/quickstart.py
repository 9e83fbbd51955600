"""Trains all stages of the quickstart on the synthetic world, in minutes on two CPU cores.

`--config=configs/quickstart.py:contrastive`, `:language_model`, `:flamingo` (the default) or
`:without_images`, a baseline that is trained on the same text with all images removed.
`:stage=flamingo,root=FOLDER`, or `:flamingo,FOLDER`, reads data and exports from another
folder than `runs/quickstart`.

Differences from the paper, and why:

- Learning rates are higher and fall to 0, and gates start open with small output weights,
  since the runs are short.
- The loss is the mean over tokens, since captions would hardly count beside long pages.
- Long captions (LTIP) weigh as much as pages, since they teach which of two things is on the
  left. With the paper's weight of 0.2, which was meant for sums over sequences, this takes
  three times the steps.
- p_next is 0 and captions start without a space, since a small model does better with one form
  of each sentence.
- The resampler adds grid positions, since the encoder is shallow.
- Images are not flipped, since the text mentions left and right.
"""

import dataclasses

import ml_collections

from configs.base import held_out, stage_of
from flamingo_jax.configuring import to_config
from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.evaluator_config import EvaluatorConfig
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
    PositionsConfig,
    ResamplerConfig,
    TextEncoderConfig,
    TrainingConfig,
    VisionConfig,
)

ROOT = "runs/quickstart"
VOCABULARY = 384
VISION = VisionConfig(variant="tiny", image_size=48, mean=(0.2, 0.2, 0.2), std=(0.25, 0.25, 0.25))
LANGUAGE_MODEL = LanguageModelConfig(
    vocab_size=VOCABULARY,
    layers=4,
    width=128,
    attention=AttentionConfig(heads=4, head_width=32),
    feed_forward=FeedForwardConfig(width=512, activation="squared_relu"),
    positions=PositionsConfig(bias_init=2.0),
    embedding_scale=3.0,
)
"""Uses squared ReLU instead of GELU, since its gradient takes half the time on CPU."""


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of the argument `stage,root`, by default the Flamingo's."""
    if "without_pictures" in arg.partition(",")[0]:
        raise UserError("the stage without_pictures is now called without_images: write that")
    return to_config(stage_of(arg, "quickstart", STAGES, ROOT))


def _data(root: str, kind: str, name: str, **options: object) -> DatasetConfig:
    return DatasetConfig(kind=kind, path=f"{root}/data/{name}", leading_space=0.0, **options)  # type: ignore[arg-type]


def contrastive(root: str) -> Experiment:
    """Trains the vision encoder together with a text encoder (paper B.1.3)."""
    data = {name: _data(root, "pairs", name, batch_size=128) for name in ("align", "ltip")}
    return Experiment(
        name="contrastive",
        task="contrastive",
        contrastive=ContrastiveConfig(
            vision=VISION,
            text=TextEncoderConfig(
                vocab_size=VOCABULARY, layers=2, width=128, heads=4, max_length=16
            ),
            joint_width=128,
            initial_temperature=0.1,
            label_smoothing=0.0,
            merge_duplicates=True,
        ),
        tokenizer=f"{root}/data/tokenizer",
        data=data,
        evaluators={"retrieval": EvaluatorConfig("retrieval", f"{root}/data/ltip", limit=256)},
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            warmup_steps=50,
            schedule="cosine",
            beta2=0.99,
            weight_decay=0.01,
            clip_norm=1.0,
            adaptive_clip=0.0,
            weight_decay_exclude=(),
        ),
        training=TrainingConfig(
            steps=450,
            evaluate_every=10_000,
            save_every=100,
            keep_last=2,
            compute_dtype="float32",
            log_every=10,
        ),
    )


def language_model(root: str) -> Experiment:
    """Trains the language model, on text about the same world."""
    return Experiment(
        name="language model",
        task="language_modelling",
        language_model=LANGUAGE_MODEL,
        tokenizer=f"{root}/data/tokenizer",
        data={"text": _data(root, "text", "text", batch_size=8, max_length=128)},
        held_out={
            name: _data(root, "text", name, batch_size=32, max_length=128, split="validation")
            for name in ("text", "namings", "lookups")
        },
        optimizer=OptimizerConfig(
            learning_rate=1.5e-3,
            warmup_steps=50,
            schedule="cosine",
            beta2=0.98,
            weight_decay=0.1,
            weight_decay_exclude=(),
        ),
        training=TrainingConfig(
            steps=3000,
            evaluate_every=1000,
            evaluate_batches=4,
            save_every=500,
            keep_last=2,
            loss="token_mean",
            compute_dtype="float32",
            log_every=10,
            # Losses that show in-context learning. namings: about 1.0 if every new word is
            # known when it occurs again, 1.3 and more if it is guessed. lookups: 0.8 if the
            # word that followed before is looked up, above 0.9 if it is guessed.
            required_loss={"namings": 1.1, "lookups": 0.87},
        ),
    )


def flamingo(root: str, use_visuals: bool = True) -> Experiment:
    """Trains the Flamingo on the four datasets."""
    data = {
        "m3w": _data(root, "pages", "m3w", batch_size=6, max_length=128, visuals=12, weight=1.0),
        "align": _data(root, "pairs", "align", batch_size=2, max_length=48, visuals=6, weight=0.2),
        "ltip": _data(root, "pairs", "ltip", batch_size=12, max_length=64, visuals=5, weight=1.0),
        "vtp": _data(
            root, "videos", "vtp", batch_size=4, max_length=32, visuals=2, frames=8, weight=0.03
        ),
    }
    return Experiment(
        name="flamingo",
        task="flamingo",
        flamingo=FlamingoConfig(
            vision=VISION,
            language_model=LANGUAGE_MODEL,
            resampler=ResamplerConfig(
                layers=1,
                width=128,
                heads=4,
                head_width=32,
                latents=16,
                frames=8,
                feed_forward=512,
                position_grid=6,
            ),
            conditioning=ConditioningConfig(
                xattn_every=1,
                heads=4,
                head_width=32,
                feed_forward=512,
                gate_init=1.0,
                out_scale=0.3,
            ),
        ),
        tokenizer=f"{root}/data/tokenizer",
        data=data,
        held_out=held_out(data),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup_steps=50, schedule="cosine", beta2=0.98, weight_decay=0.1
        ),
        training=TrainingConfig(
            steps=1200,
            evaluate_every=600,
            evaluate_batches=2,
            save_every=250,
            keep_last=2,
            loss="token_mean",
            compute_dtype="float32",
            use_visuals=use_visuals,
            cache_features=use_visuals,
            log_every=10,
        ),
        vision_encoder_from=f"{root}/contrastive/export",
        language_model_from=f"{root}/language_model/export",
    )


def without_images(root: str) -> Experiment:
    """Trains the same model on the same text without images: the baseline that shows what can
    be answered without seeing the image.
    """
    experiment = flamingo(root, use_visuals=False)
    training = dataclasses.replace(experiment.training, steps=100)
    return dataclasses.replace(experiment, name="without images", held_out={}, training=training)


STAGES = {
    "contrastive": contrastive,
    "language_model": language_model,
    "flamingo": flamingo,
    "without_images": without_images,
}
