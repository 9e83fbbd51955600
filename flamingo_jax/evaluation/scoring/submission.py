"""Writes predictions in the forms that the owners of benchmarks score."""

import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet
from flamingo_jax.evaluation.protocol.benchmark import Prediction


def submission(
    predictions: Sequence[Prediction], benchmark: BenchmarkSet, unasked: Iterable[str] = ()
) -> Any:
    """Returns predictions in the form of a benchmark's owners, as JSON can hold it.

    Args:
      unasked: ids of more questions, which get an empty answer, such as those of VQAv2's test
        split beside test-dev: its server wants an answer to each.

    Raises: UserError for a benchmark without such a form.
    """
    if not benchmark.submission:
        raise UserError(
            f"the owners of {benchmark.name} have no form of submissions: score its predictions"
            " here"
        )
    texts = dict.fromkeys(unasked, "") | {one.id: one.text for one in predictions}
    return FORMS[benchmark.submission](texts)


def write_submission(
    file: pathlib.Path,
    predictions: Sequence[Prediction],
    benchmark: BenchmarkSet,
    unasked: Iterable[str] = (),
) -> None:
    """Writes predictions in the form of a benchmark's owners; see `submission`."""
    content = submission(predictions, benchmark, unasked)
    try:
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}): name another file") from None


def _vqa(texts: dict[str, str]) -> list[dict[str, Any]]:
    """VQAv2's, OK-VQA's and TextVQA's results."""
    return [{"question_id": _number(key), "answer": text} for key, text in texts.items()]


def _vizwiz(texts: dict[str, str]) -> list[dict[str, Any]]:
    """VizWiz's results, by name of the image."""
    return [{"image": key, "answer": text} for key, text in texts.items()]


def _captions(texts: dict[str, str]) -> list[dict[str, Any]]:
    """COCO's results of captions."""
    return [{"image_id": _number(key), "caption": text} for key, text in texts.items()]


def _textcaps(texts: dict[str, str]) -> list[dict[str, Any]]:
    """TextCaps' results: ids are of 16 hexadecimal digits, texts even where all are decimal."""
    return [{"image_id": key, "caption": text} for key, text in texts.items()]


def _nextqa(texts: dict[str, str]) -> dict[str, dict[str, str]]:
    """NExT-OE's results, by video and question."""
    videos: dict[str, dict[str, str]] = {}
    for key, text in texts.items():
        video, _, question = key.rpartition("_")
        videos.setdefault(video, {})[question] = text
    return videos


FORMS: dict[str, Callable[[dict[str, str]], Any]] = {
    "vqa": _vqa,
    "vizwiz": _vizwiz,
    "captions": _captions,
    "textcaps": _textcaps,
    "nextqa": _nextqa,
}
"""{name: {id: text} -> what a file of the owners' form holds}."""


def _number(key: str) -> int | str:
    """Returns an id as its file has it: ids that are numbers are no texts there."""
    return int(key) if key.isdecimal() else key
