r"""Trains a small Flamingo that answers questions about your own images or clips, in minutes
on two
CPU cores: copy this file and change it.

    python -m launch.build_data questions_folder --input=my_questions \
        --output=runs/vqa/data/questions --test_share=0.2
    python -m launch.build_data sentencepiece --input=runs/vqa/data/questions \
        --output=runs/vqa/data/tokenizer --vocab_size=480
    python -m launch.train --config=configs/vqa.py:contrastive,runs/vqa \
        --workdir=runs/vqa/contrastive

then `:language_model` and `:flamingo` (for clips `:video`). Export each stage to
`<folder>/<stage>/export` before the next one starts (data_pipelines/README.md has all
commands).

The encoder is trained first, on all questions and answers of an image as one text. Trained on
single answers, most of them yes or no, it would learn easy features such as colours, and
nothing else for thousands of steps. Then it is frozen, and each image is encoded only once. If
you have a trained encoder, name its export in `vision_encoder_from` and skip this stage.
`:finetune` continues from the Flamingo with the encoder unfrozen (paper 3.2, B.2.2).
"""

import dataclasses

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

VOCABULARY = 480
"""Size of the tokenizer (`launch.build_data sentencepiece --vocab_size=480`), since questions
use few words.
"""
VISION = VisionConfig(variant="tiny", image_size=64)
LANGUAGE_MODEL = LanguageModelConfig(
    vocab_size=VOCABULARY,
    layers=3,
    width=128,
    attention=AttentionConfig(heads=4, head_width=32),
    feed_forward=FeedForwardConfig(width=512, activation="squared_relu"),
    embedding_scale=3.0,
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of the argument `stage,root`, by default the Flamingo's."""
    return to_config(stage_of(arg, "vqa", STAGES, "runs/vqa"))


def _questions(folder: str, **options: object) -> dict[str, DatasetConfig]:
    path = f"{folder}/data/questions"
    return {"questions": DatasetConfig(kind="questions", path=path, **options)}  # type: ignore[arg-type]


def _contrastive(folder: str) -> Experiment:
    """Trains the vision encoder on images, each with all its questions and answers as one
    text.
    """
    return Experiment(
        name="contrastive",
        task="contrastive",
        contrastive=ContrastiveConfig(
            vision=VISION,
            text=TextEncoderConfig(
                vocab_size=VOCABULARY, layers=2, width=128, heads=4, max_length=64
            ),
            joint_width=128,
            initial_temperature=0.1,
            label_smoothing=0.0,
        ),
        tokenizer=f"{folder}/data/tokenizer",
        data=_questions(folder, batch_size=64),
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            warmup_steps=30,
            schedule="cosine",
            beta2=0.98,
            weight_decay_exclude=(),
        ),
        training=TrainingConfig(
            steps=600,
            log_every=10,
            evaluate_every=10_000,
            save_every=200,
            keep_last=2,
            compute_dtype="float32",
        ),
    )


def _language_model(folder: str) -> Experiment:
    """Trains the language model on the questions with their answers, without the images."""
    data = _questions(folder, batch_size=16, max_length=128)
    return Experiment(
        name="language model",
        task="language_modelling",
        language_model=LANGUAGE_MODEL,
        tokenizer=f"{folder}/data/tokenizer",
        data=data,
        held_out=held_out(data),
        optimizer=OptimizerConfig(
            learning_rate=1.5e-3,
            warmup_steps=20,
            schedule="cosine",
            beta2=0.98,
            weight_decay_exclude=(),
        ),
        training=TrainingConfig(
            steps=150,
            log_every=10,
            evaluate_every=150,
            evaluate_batches=2,
            save_every=150,
            keep_last=2,
            loss="token_mean",
            compute_dtype="float32",
        ),
    )


def _flamingo(folder: str) -> Experiment:
    """Trains the Flamingo. A row has one image and its questions; if they do not fit, further
    rows have the same image.
    """
    data = _questions(folder, batch_size=16, max_length=64, visuals=1)
    return Experiment(
        name="flamingo",
        task="flamingo",
        flamingo=FlamingoConfig(
            vision=VISION,
            language_model=LANGUAGE_MODEL,
            # The features of the tiny encoder are local and say little about position, so the
            # resampler adds position embeddings.
            resampler=ResamplerConfig(
                layers=1,
                width=128,
                heads=4,
                head_width=32,
                latents=8,
                frames=8,
                feed_forward=512,
                position_grid=8,
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
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=50, schedule="cosine", beta2=0.98
        ),
        training=TrainingConfig(
            steps=800,
            log_every=10,
            evaluate_every=200,
            evaluate_batches=4,
            save_every=200,
            keep_last=2,
            loss="token_mean",
            compute_dtype="float32",
            cache_features=True,
        ),
        vision_encoder_from=f"{folder}/contrastive/export",
        language_model_from=f"{folder}/language_model/export",
    )


def _video(folder: str) -> Experiment:
    """Trains the Flamingo on clips: eight consecutive frames of those that were stored
    (`launch.build_data --fps`).
    """
    data = _questions(folder, batch_size=16, max_length=64, visuals=1, frames=8)
    return dataclasses.replace(_flamingo(folder), data=data, held_out=held_out(data))


def _finetune(folder: str) -> Experiment:
    """Continues from `<folder>/flamingo/export` with the encoder trained too, at a learning
    rate that falls by factors of 10. For larger images set flamingo.vision.image_size (paper:
    480).
    """
    flamingo = _flamingo(folder)
    return dataclasses.replace(
        flamingo,
        name="fine-tuning",
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            warmup_steps=10,
            schedule="stepwise",
            boundaries=(150, 250),
            beta2=0.98,
        ),
        training=dataclasses.replace(
            flamingo.training,
            steps=300,
            evaluate_every=100,
            save_every=100,
            cache_features=False,
            unfreeze_vision_encoder=True,
        ),
        vision_encoder_from="",
        language_model_from="",
        flamingo_from=f"{folder}/flamingo/export",
    )


STAGES = {
    "contrastive": _contrastive,
    "language_model": _language_model,
    "flamingo": _flamingo,
    "video": _video,
    "finetune": _finetune,
}
