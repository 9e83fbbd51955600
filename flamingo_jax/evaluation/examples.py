"""Examples of benchmarks: an image or a clip with a question and its ground truths. Converts
dataset records to examples.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.media import ComputedMedia, MediaRef, Preprocessing
from flamingo_jax.processing.text import text_of
from flamingo_jax.processing.video import middle_clip
from flamingo_jax.processing.visuals import Visual, check_visual, read_visual
from flamingo_jax.progress import Bar


@dataclasses.dataclass(frozen=True, eq=False)
class BenchmarkExample:
    """An image or a clip with a question and its ground truths.

    answers: ground truth captions, class names or answers; the first is written in prompts.
    question: "" for captioning.
    question_type: "" or a type, for metrics by type of question.
    cluster: what several examples have in common, such as the id of their image: an example of
      the same cluster is never a query's shot, and errors of means are over clusters. "" for an
      example on its own.
    candidates: the answers that are ranked, where each query has its own; else ().
    context: the query's own shots in their order, the last ones for fewer of them, where a
      benchmark gives them; None where shots are chosen from the support set.
    details: what the metric reads besides, as JSON can hold it.
    """

    id: str
    media: MediaRef
    answers: tuple[str, ...]
    question: str = ""
    question_type: str = ""
    cluster: str = ""
    candidates: tuple[str, ...] = ()
    context: "tuple[BenchmarkExample, ...] | None" = None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class InterleavedPage:
    """A page of k images and k + 1 texts: one before the first image and one after each."""

    id: str
    texts: tuple[str, ...]
    media: tuple[MediaRef, ...]


def read_examples(
    records: Sequence[Any], kind: str, *, fps: float | None = None, name: str = ""
) -> list[BenchmarkExample]:
    """Converts records of kind pairs, videos or questions to examples. Images stay where they
    are: they are read again from `records`, and decoded, when they are needed.

    Args:
      records: with the fields of data_pipelines/features.py, images still encoded.
      fps: frame rate at which clips will be sampled; by default the stored rate.
      name: of the dataset, for progress; "" for none.

    Raises: UserError that names the record whose image is no image, that has no answer, or
      whose video was stored at a lower rate.
    """
    examples = []
    with Bar(name, len(records), enabled=bool(name)) as bar:
        for place in range(len(records)):
            examples.append(_example(records, place, kind, fps))
            bar.advance()
    return examples


def _example(records: Sequence[Any], place: int, kind: str, fps: float | None) -> BenchmarkExample:
    record = records[place]
    name = text_of(record["id"])
    encoded = _encoded(record, kind)
    if not encoded:
        raise UserError(f"{name} has no image: leave it out")
    check_visual(encoded, name)
    if fps is not None and len(encoded) > 1:
        _every(record, fps, name)
    answers = _answers(record, kind)
    if not answers:
        raise UserError(
            f"the record {name!r} has no answer to compare a prediction with: leave it out"
            " of the evaluation data"
        )
    asked = kind == "questions"
    pixels = digest_of(encoded)
    return BenchmarkExample(
        name,
        ComputedMedia(
            pixels,
            lambda how: _read_record(records[place], kind, name, how),
            len(encoded),
        ),
        answers,
        text_of(record["question"]) if asked else "",
        text_of(record["type"]) if asked else "",
        # Each question has its own copy of the image that others are about too.
        cluster=pixels if asked else "",
    )


def _encoded(record: Any, kind: str) -> list[bytes]:
    """Returns the encoded frames of a record."""
    return [record["image"]] if kind == "pairs" else list(record["frames"])


def _read_record(record: Any, kind: str, name: str, how: Preprocessing) -> Visual:
    """Decodes the frames in the middle of a record."""
    encoded = _encoded(record, kind)
    still = len(encoded) == 1 or how.fps is None
    every = 1.0 if still else _every(record, how.fps or 0.0, name)
    kept = middle_clip(len(encoded), how.frames, every=every)
    return read_visual([encoded[place] for place in kept], how.vision, name)


def digest_of(encoded: Iterable[bytes]) -> str:
    """Identifies the pixels of encoded frames."""
    content = hashlib.blake2b(digest_size=16)
    for data in encoded:
        content.update(len(data).to_bytes(8) + data)
    return content.hexdigest()


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


def read_pages(records: Sequence[Any]) -> list[InterleavedPage]:
    """Converts records of kind pages. Images stay where they are, as in `read_examples`.

    Raises: UserError that names the record whose image is no image.
    """
    return [_page(records, place) for place in range(len(records))]


def _page(records: Sequence[Any], place: int) -> InterleavedPage:
    record = records[place]
    name = text_of(record["id"])

    def media(number: int, image: bytes) -> MediaRef:
        check_visual([image], name)

        def read(how: Preprocessing) -> Visual:
            return read_visual([records[place]["images"][number]], how.vision, name)

        return ComputedMedia(digest_of([image]), read)

    return InterleavedPage(
        name,
        tuple(text_of(text) for text in record["texts"]),
        tuple(media(*numbered) for numbered in enumerate(record["images"])),
    )


def page_examples(pages: Sequence[InterleavedPage]) -> list[BenchmarkExample]:
    """Makes support examples from those texts of pages that have the format of prompts
    (evaluation/prompts.py); other texts are skipped.
    """
    examples = []
    for page in pages:
        for place, (text, media) in enumerate(zip(page.texts[1:], page.media, strict=True)):
            caption = re.fullmatch(r"\s*Output: (.+?)\s*", text)
            asked = re.fullmatch(r"\s*Question: (.+?) Answer: (.+?)\s*", text)
            if caption:
                examples.append(BenchmarkExample(f"{page.id}/{place}", media, (caption[1],)))
            elif asked:
                examples.append(
                    BenchmarkExample(f"{page.id}/{place}", media, (asked[2],), asked[1])
                )
    return examples


def _plain(caption: str) -> str:
    """Removes the prompt "Output: " from a caption, which some training data have in front of
    it; the template would add it a second time.
    """
    return re.sub(r"^\s*Output: ", "", caption)
