"""Reads the images of an evaluator's records, and caches them in memory where they are few."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from flamingo_jax.evaluation.datasets import DatasetReader
from flamingo_jax.evaluation.evaluator_config import EvaluatorConfig
from flamingo_jax.evaluation.selection.shots import draw
from flamingo_jax.experiment import VisionConfig
from flamingo_jax.processing.text import text_of
from flamingo_jax.processing.visuals import read_visual

CACHED_BYTES = 256 << 20
"""Images are cached between evaluations if all of them, decoded, fit into this many bytes."""


class ImageSet:
    """A random sample of a split's records, at most `config.limit`, and their images at the
    model's size.
    """

    def __init__(
        self,
        datasets: DatasetReader,
        config: EvaluatorConfig,
        kind: str,
        vision: VisionConfig,
        seed: int,
    ):
        found = datasets.records(config.path, config.split, kind)
        places = draw(seed, f"{config.path}:{config.split}", len(found), config.limit)
        self._found, self._places, self._kind, self._vision = found, places, kind, vision
        self._kept: dict[int, np.ndarray] = {}
        size = len(places) * vision.image_size**2 * 3
        self._keeps = size <= CACHED_BYTES

    def __len__(self) -> int:
        return len(self._places)

    @property
    def records(self) -> Iterator[Any]:
        """Yields the records; they are read one at a time."""
        return (self._found[place] for place in self._places)

    @property
    def images(self) -> Iterator[np.ndarray]:
        """Yields each record's image, uint8 [H, W, 3]; for a clip its middle frame.

        Raises: UserError that names the record whose image cannot be read.
        """
        for place in self._places:
            image = self._kept.get(place)
            if image is None:
                image = self._read(self._found[place])
                if self._keeps:
                    self._kept[place] = image
            yield image

    def _read(self, record: Any) -> np.ndarray:
        frames: Sequence[bytes] = (
            [record["image"]] if self._kind == "pairs" else list(record["frames"])
        )
        return read_visual([frames[len(frames) // 2]], self._vision, text_of(record["id"])).frames[
            0
        ]
