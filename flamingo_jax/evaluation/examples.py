"""Evaluation records as examples: one visual with what is asked about it and its ground truths."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import FlamingoConfig
from flamingo_jax.processing.video import middle_clip
from flamingo_jax.processing.visuals import Visual, read_visual


@dataclasses.dataclass(frozen=True, eq=False)
class BenchmarkExample:
    """A visual with what is asked about it and its ground truths.

    answers: any caption or class name that is true, or the ground truths of a question; the
      first stands in prompts.
    question: "" for captions.
    question_type: for metrics by type of question.
    """

    id: str
    visual: Visual
    answers: tuple[str, ...]
    question: str = ""
    question_type: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class InterleavedPage:
    """A page of k + 1 texts around k images."""

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
    """Reads records of kind pairs, videos or questions, their images encoded as on disk
    (data_pipelines/features.py has the fields).

    Args:
      frames: the most frames of a clip, from its middle; by default as many as the resampler
        was trained with.
      fps: frames a second of clips, no more than were stored; by default all that were stored,
        as in training.

    Raises: UserError that names the record whose image cannot be read, that has no answer, or
      whose video was stored at a lower rate.
    """
    examples = []
    for record in records:
        name = _text(record["id"])
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
            (_text(record["question"]), _text(record["type"])) if kind == "questions" else ("", "")
        )
        examples.append(BenchmarkExample(name, visual, answers, question, question_type))
    return examples


def _answers(record: Any, kind: str) -> tuple[str, ...]:
    if kind == "questions":
        return tuple(_text(text) for text in record["answers"])
    return tuple(_plain(_text(text)) for text in record["captions"])


def first_answer(record: Any, kind: str) -> str:
    """Reads what stands in prompts as a record's answer, without a look at its visual; "" where
    there is none.
    """
    return next(iter(_answers(record, kind)), "")


def _every(record: Any, fps: float, name: str) -> float:
    """Stored frames from one frame of a clip at `fps` to the next."""
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
    """Reads records of kind pages.

    Raises UserError that names the record whose image cannot be read.
    """
    pages = []
    for record in records:
        name = _text(record["id"])
        visuals = tuple(read_visual([image], config.vision, name) for image in record["images"])
        pages.append(InterleavedPage(name, tuple(_text(text) for text in record["texts"]), visuals))
    return pages


def page_examples(pages: Sequence[InterleavedPage]) -> list[BenchmarkExample]:
    """Makes examples of the chunks of pages that are written as prompts are
    (evaluation/prompts.py), for support sets.
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
    """A caption without the prompt that some training data tell it with: prompts would say it
    twice.
    """
    return re.sub(r"^\s*Output: ", "", caption)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
