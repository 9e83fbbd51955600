"""A tiny Flamingo and random packed batches, shared by the tests of training."""

import numpy as np

from flamingo_jax.experiment import (
    AttentionConfig,
    ConditioningConfig,
    DatasetConfig,
    Experiment,
    FeedForwardConfig,
    FlamingoConfig,
    LanguageModelConfig,
    OptimizerConfig,
    ResamplerConfig,
    TrainingConfig,
    VisionConfig,
)

VOCABULARY = 30
FLAMINGO = FlamingoConfig(
    vision=VisionConfig(variant="tiny", image_size=32),
    language_model=LanguageModelConfig(
        vocab_size=VOCABULARY,
        layers=2,
        width=16,
        attention=AttentionConfig(heads=2, head_width=8),
        feed_forward=FeedForwardConfig(width=32),
    ),
    resampler=ResamplerConfig(
        layers=1, width=16, heads=2, head_width=8, latents=2, frames=2, feed_forward=32
    ),
    conditioning=ConditioningConfig(
        heads=2,
        head_width=8,
        feed_forward=32,
    ),
)
DATA = {
    "m3w": DatasetConfig(kind="pages", batch_size=8, max_length=16, visuals=2, weight=1.0),
    "align": DatasetConfig(kind="pairs", batch_size=8, max_length=12, visuals=2, weight=0.2),
    "ltip": DatasetConfig(kind="pairs", batch_size=8, max_length=12, visuals=2, weight=0.2),
    "vtp": DatasetConfig(
        kind="videos", batch_size=8, max_length=12, visuals=1, frames=2, weight=0.03
    ),
}


def experiment(**changes: object) -> Experiment:
    """An experiment on untrained frozen parts."""
    options = dict(
        name="tiny",
        task="flamingo",
        flamingo=FLAMINGO,
        data=DATA,
        vision_encoder_from="random",
        language_model_from="random",
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        training=TrainingConfig(
            steps=6, log_every=1, save_every=2, evaluate_every=100, compute_dtype="float32"
        ),
    )
    return Experiment(**(options | changes))  # type: ignore[arg-type]


def batch(dataset: DatasetConfig, seed: int) -> dict[str, np.ndarray]:
    """Rows of two segments with a visual each (one segment where the row has room for one
    visual) and some padding.
    """
    rng = np.random.default_rng(seed)
    rows, length, places, frames = (
        dataset.batch_size,
        dataset.max_length,
        dataset.visuals,
        dataset.frames,
    )
    tokens = rng.integers(0, VOCABULARY + 1, (rows, length), dtype=np.int32)
    segments, positions = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    media_index = np.full((rows, length), -1, np.int32)
    for row in range(rows):
        cuts = [0, *sorted(rng.choice(np.arange(4, length), places, replace=False).tolist())]
        for place in range(places):
            start, stop = cuts[place], cuts[place + 1]
            segments[row, start:stop], positions[row, start:stop] = (
                place + 1,
                np.arange(stop - start),
            )
            media_index[row, start + 1 : stop] = place
    return {
        "images": rng.integers(0, 256, (rows * places, frames, 32, 32, 3), dtype=np.uint8),
        "frame_mask": np.ones((rows * places, frames), bool),
        "tokens": tokens,
        "positions": positions,
        "segments": segments,
        "media_index": media_index,
        "loss_mask": (segments > 0) & (positions > 0) & (rng.random((rows, length)) < 0.8),
        "visuals": np.arange(rows * places, dtype=np.int32).reshape(rows, places),
    }


def batches(seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    return {
        name: batch(dataset, seed * 10 + number)
        for number, (name, dataset) in enumerate(DATA.items())
    }


class Stream:
    """An endless dataset of random batches with a position, as the loop wants it."""

    def __init__(self, dataset: DatasetConfig, number: int):
        self.dataset, self.number, self.position = dataset, number, 0

    def __next__(self) -> dict[str, np.ndarray]:
        self.position += 1
        return batch(self.dataset, 100 * self.number + self.position % 3)

    def get_state(self) -> dict[str, int]:
        return {"global_next_index": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["global_next_index"]


def streams() -> dict[str, Stream]:
    return {name: Stream(dataset, number) for number, (name, dataset) in enumerate(DATA.items())}
