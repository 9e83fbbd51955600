"""Datasets in memory, as evaluators read them, and a tiny contrastive model."""

import io
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from PIL import Image

from flamingo_jax.experiment import (
    ContrastiveConfig,
    Experiment,
    TextEncoderConfig,
    TrainingConfig,
    VisionConfig,
)

SIZE = 16
NAMES = ("red circle", "blue star", "green square", "red star", "blue circle", "a dax", "a wug")


class MemoryDatasets:
    """{path: (kind, {split: records})}."""

    def __init__(self, **datasets: tuple[str, dict[str, list[dict[str, Any]]]]):
        self._datasets = datasets

    def kind(self, path: str) -> str:
        return self._datasets[path][0]

    def splits(self, path: str) -> Collection[str]:
        return list(self._datasets[path][1])

    def records(self, path: str, split: str, kind: str) -> Sequence[Any]:
        assert kind == self.kind(path)
        return self._datasets[path][1][split]


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def pair(number: int, *captions: str) -> dict[str, Any]:
    return {
        "id": f"p{number}".encode(),
        "image": png(number),
        "captions": [caption.encode() for caption in captions],
    }


def question(number: int, answer: str) -> dict[str, Any]:
    return {
        "id": f"q{number}".encode(),
        "frames": [png(number)],
        "question": b"what is this",
        "answers": [answer.encode()],
        "type": b"",
    }


def contrastive(vocab_size: int, **changes: Any) -> Experiment:
    return Experiment(
        task="contrastive",
        contrastive=ContrastiveConfig(
            vision=VisionConfig(variant="one_stage", image_size=SIZE),
            text=TextEncoderConfig(vocab_size=vocab_size, layers=1, width=8, heads=2, max_length=8),
            joint_width=12,
            **changes,
        ),
        training=TrainingConfig(compute_dtype="float32"),
    )
