"""Examples to ask about or to show as shots, from a dataset or from a file of prompts."""

from collections.abc import Sequence
from typing import Any

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation import prompts
from flamingo_jax.evaluation.datasets import DatasetReader
from flamingo_jax.evaluation.examples import read_examples, read_pages
from flamingo_jax.evaluation.media import Preprocessing
from flamingo_jax.evaluation.selection.shots import draw
from flamingo_jax.experiment import FlamingoConfig
from flamingo_jax.inference.prompts import escape_image_tags
from flamingo_jax.playground.session import Example, Part
from flamingo_jax.processing.visuals import Visual, VisualSource

SPLITS = ("validation", "test")
"""Splits to take examples from, the first that a dataset has; else its last."""


def dataset_examples(
    datasets: DatasetReader, path: str, config: FlamingoConfig, count: int, seed: int
) -> list[Example]:
    """Draws examples from a dataset of pairs, videos, questions or pages.

    Args:
      path: the dataset's folder, or FOLDER:SPLIT; by default its validation or test split.
      config: the model's, for the image size and the number of frames.

    Raises: UserError where there is no such dataset or split, or it has no visuals.
    """
    folder, split = _split(datasets, path)
    kind = datasets.kind(folder)
    if kind == "text":
        raise UserError(f"the dataset {folder} holds text alone: name one with images or clips")
    records = datasets.records(folder, split, kind)
    drawn = [records[place] for place in draw(seed, f"{folder}:{split}", len(records), count)]
    how = Preprocessing.of(config)
    if kind == "pages":
        return [
            _continued(
                [
                    part
                    for pair in zip([one.read(how) for one in page.media], page.texts[1:])
                    for part in pair
                ]
            )
            for page in read_pages(drawn)
        ]
    template = prompts.QUESTION if kind == "questions" else prompts.CAPTION
    return [
        Example(
            (example.media.read(how), template.opening(example)),
            f" {escape_image_tags(example.answers[0])}",
        )
        for example in read_examples(drawn, kind)
    ]


def prompt_examples(
    listed: Sequence[Sequence[Any]], config: FlamingoConfig, count: int
) -> list[Example]:
    """Makes examples of prompts of texts, images and videos, the first `count` of them."""
    return [Example(tuple(_part(part, config) for part in one)) for one in listed[:count]]


def _split(datasets: DatasetReader, path: str) -> tuple[str, str]:
    folder, _, split = path.rpartition(":")
    if folder:
        return folder, split
    splits = list(datasets.splits(path))
    return path, next((name for name in SPLITS if name in splits), splits[-1])


def _part(part: Any, config: FlamingoConfig) -> Part:
    if isinstance(part, VisualSource):
        return part.visual(config.vision, config.resampler.frames)
    assert isinstance(part, str | Visual)
    return part


def _continued(parts: list[Part]) -> Example:
    """Splits a page's last word off, as the answer."""
    texts = [escape_image_tags(part) if isinstance(part, str) else part for part in parts]
    opening, word = prompts.split_last_word(str(texts[-1]))
    return Example((*texts[:-1], opening), f" {word}")
