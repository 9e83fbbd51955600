"""Converts dataset records to evaluation examples: a visual with a question and its ground
truths.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import FlamingoConfig
from flamingo_jax.processing.text import text_of
from flamingo_jax.processing.video import middle_clip
from flamingo_jax.processing.visuals import Visual, read_visual


@dataclasses.dataclass(frozen=True, eq=False)
class BenchmarkExample:
    """A visual with a question and its ground truths.

    answers: ground truth captions, class names or answers; the first is written in prompts.
    question: "" for captioning.
    question_type: "" or a type, for metrics by type of question.
    """

    id: str
    visual: Visual
    answers: tuple[str, ...]
    question: str = ""
    question_type: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class InterleavedPage:
    """A page of k images and k + 1 texts: one before the first image and one after each."""

    id: str
    texts: tuple[str, ...]
    visuals: tuple[Visual, ...]


def read_examples(
    records: Iterable[Any],
    kind: str,
    config: FlamingoConfig,
    *,
    frames: int | None = None,
    fps: float | None = None,
) -> list[BenchmarkExample]:
    """Converts records of kind pairs, videos or questions to examples.

    Args:
      records: with the fields of data_pipelines/features.py, images still encoded.
      config: the model's, for the image size and the number of frames.
      frames: the most frames of a clip, taken from its middle; by default as many as the
        resampler was trained with.
      fps: frame rate to sample clips at, at most the stored rate; by default the stored rate,
        as in training.

    Raises: UserError that names the record whose image cannot be read, that has no answer, or
      whose video was stored at a lower rate.
    """
    examples = []
    for record in records:
        name = text_of(record["id"])
        encoded = [record["image"]] if kind == "pairs" else list(record["frames"])
        every = (
            1.0
            if kind == "pairs" or fps is None or len(encoded) == 1
            else _every(record, fps, name)
        )
        kept = middle_clip(len(encoded), frames or config.resampler.frames, every=every)
        visual = read_visual([encoded[place] for place in kept], config.vision, name)
        answers = _answers(record, kind)
        if not answers:
            raise UserError(
                f"the record {name!r} has no answer to compare a prediction with: leave it out"
                " of the evaluation data"
            )
        question, question_type = (
            (text_of(record["question"]), text_of(record["type"]))
            if kind == "questions"
            else ("", "")
        )
        examples.append(BenchmarkExample(name, visual, answers, question, question_type))
    return examples


def _answers(record: Any, kind: str) -> tuple[str, ...]:
    if kind == "questions":
        return tuple(text_of(text) for text in record["answers"])
    return tuple(_plain(text_of(text)) for text in record["captions"])


def first_answer(record: Any, kind: str) -> str:
    """Returns a record's first answer without decoding its visual; "" where it has none."""
    return next(iter(_answers(record, kind)), "")


def _every(record: Any, fps: float, name: str) -> float:
    """Computes the step, in stored frames, between the frames of a clip sampled at `fps`."""
    stored = float(record["fps"]) if "fps" in record else 0.0
    if not stored:
        raise UserError(
            f"{name} does not say its frame rate, so that none can be asked for: leave --fps away"
        )
    if fps > stored * (1 + 1e-6):
        raise UserError(
            f"{name} was stored at {stored:g} frames a second, fewer than --fps={fps:g}: "
            "build the dataset again with that --fps, or ask for a lower one"
        )
    return max(1.0, stored / fps)


def read_pages(records: Iterable[Any], config: FlamingoConfig) -> list[InterleavedPage]:
    """Converts records of kind pages, decoding their images.

    Raises: UserError that names the record whose image cannot be read.
    """
    pages = []
    for record in records:
        name = text_of(record["id"])
        visuals = tuple(read_visual([image], config.vision, name) for image in record["images"])
        pages.append(
            InterleavedPage(name, tuple(text_of(text) for text in record["texts"]), visuals)
        )
    return pages


def page_examples(pages: Sequence[InterleavedPage]) -> list[BenchmarkExample]:
    """Makes support examples from those texts of pages that have the format of prompts
    (evaluation/prompts.py); other texts are skipped.
    """
    examples = []
    for page in pages:
        for place, (text, visual) in enumerate(zip(page.texts[1:], page.visuals, strict=True)):
            caption = re.fullmatch(r"\s*Output: (.+?)\s*", text)
            asked = re.fullmatch(r"\s*Question: (.+?) Answer: (.+?)\s*", text)
            if caption:
                examples.append(BenchmarkExample(f"{page.id}/{place}", visual, (caption[1],)))
            elif asked:
                examples.append(
                    BenchmarkExample(f"{page.id}/{place}", visual, (asked[2],), asked[1])
                )
    return examples


def _plain(caption: str) -> str:
    """Removes the prompt "Output: " from a caption, which some training data have in front of
    it; the template would add it a second time.
    """
    return re.sub(r"^\s*Output: ", "", caption)
