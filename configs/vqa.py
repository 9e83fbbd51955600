r"""Answers to questions about one's own images or clips, trained in minutes on two CPU cores:
copy this file and change it.

    python -m launch.build_data questions_folder --input=my_questions \
        --output=runs/vqa/data/questions --test_share=0.2
    python -m launch.build_data sentencepiece --input=runs/vqa/data/questions \
        --output=runs/vqa/data/tokenizer --vocab_size=480
    python -m launch.train --config=configs/vqa.py:contrastive,runs/vqa \
        --workdir=runs/vqa/contrastive

and then `:language_model` and `:flamingo` (for clips `:video`), each exported to
`<folder>/<stage>/export` before the next (README). The encoder learns first, from all of an
image's questions and answers at once: from single answers alone, most of them yes or no, it
would learn what is easy to see, as colours, and for thousands of steps nothing else. Then it is
frozen, and each image encoded once. Whoever has a trained encoder names its export in
`vision_encoder_from` and leaves that stage out. `:finetune` goes on from the Flamingo with the
encoder unfrozen (paper 3.2, B.2.2).
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
"""The size of the tokenizer (`launch.build_data sentencepiece --vocab_size=480`): few
words are asked with.
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
    """The config of one stage, by default the Flamingo: `stage,root`."""
    return to_config(stage_of(arg, "vqa", STAGES, "runs/vqa"))


def _questions(folder: str, **options: object) -> dict[str, DatasetConfig]:
    path = f"{folder}/data/questions"
    return {"questions": DatasetConfig(kind="questions", path=path, **options)}  # type: ignore[arg-type]


def _contrastive(folder: str) -> Experiment:
    """Images beside their questions and answers as one text: the encoder learns from all of
    them at once what tells images apart.
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
    """The text of the questions with their answers, without the images."""
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
    """Images, one to a row with its questions.

    A row that is too short for all of them is followed by others with the same image.
    """
    data = _questions(folder, batch_size=16, max_length=64, visuals=1)
    return Experiment(
        name="flamingo",
        task="flamingo",
        flamingo=FlamingoConfig(
            vision=VISION,
            language_model=LANGUAGE_MODEL,
            # The tiny encoder's cells see little beyond themselves: where they are is told to
            # the resampler.
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
    """Clips of eight frames, a run of neighbours among those stored (`launch.build_data
    --fps`).
    """
    data = _questions(folder, batch_size=16, max_length=64, visuals=1, frames=8)
    return dataclasses.replace(_flamingo(folder), data=data, held_out=held_out(data))


def _finetune(folder: str) -> Experiment:
    """On from `<folder>/flamingo/export` with the encoder trained too, at a rate that falls by
    factors of 10. Larger images are another flamingo.vision.image_size (paper: 480).
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
