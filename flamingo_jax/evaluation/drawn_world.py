"""The quickstart's suite on the embedded drawn world: captions, questions, clips and new words,
with and without images.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation import metrics, prompts
from flamingo_jax.evaluation.benchmarks import (
    Benchmark,
    Binding,
    Classification,
    OpenEnded,
    Result,
    Settings,
    captioning,
    question_answering,
)
from flamingo_jax.evaluation.examples import (
    Example,
    Page,
    page_examples,
    read_examples,
    read_pages,
)
from flamingo_jax.experiment import FlamingoConfig
from flamingo_jax.inference.engine import Engine

SPLITS = {"seen": "test", "unseen": "unseen"}
"""`unseen` shows only colour-shape pairs that are in no training image."""
BINDING_SHOTS = (1, 2, 4, 8, 16, 32)

ReadRecords = Callable[[str, str, str], Sequence[Any]]
"""(dataset, split, kind) -> records."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A headline figure: its name in the report, benchmark by split name, and settings."""

    figure: str
    benchmarks: dict[str, OpenEnded]


@dataclasses.dataclass(frozen=True)
class Suite:
    """Everything the suite runs, read before any work starts."""

    tasks: list[Task]
    binding: Binding
    few_shot: dict[str, OpenEnded | Classification]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One model's results: by (split name, figure), by binding shots, and by (few-shot
    benchmark, shots).
    """

    headline: dict[tuple[str, str], Result]
    binding: dict[int, Result]
    few_shot: dict[tuple[str, int], Result]


def read_suite(
    records: ReadRecords, config: FlamingoConfig, *, limit: int, few_shot_limit: int
) -> Suite:
    """Evaluation sets from their test splits, support from validation pages, pairs and clips.

    A limit of 0 takes all.
    """

    def examples(name: str, split: str, kind: str) -> list[Example]:
        return _first(read_examples(_first(records(name, split, kind), limit), kind, config), limit)

    pairs = read_examples(records("ltip", "validation", "pairs"), "pairs", config)
    clips = read_examples(records("vtp", "validation", "videos"), "videos", config)
    asked = [
        example
        for example in page_examples(read_pages(records("m3w", "validation", "pages"), config))
        if example.question
    ]
    one, two = _of_form(pairs, r" at the "), _of_form(pairs, r" (left of|above) ")

    def task(
        figure: str, dataset: str, kind: str, make: Callable[[str, list[Example]], OpenEnded]
    ) -> Task:
        return Task(
            figure,
            {
                name: make(f"{dataset}, {name}", examples(dataset, split, kind))
                for name, split in SPLITS.items()
            },
        )

    tasks = [
        task(
            "caption_one_object",
            "caption_one",
            "pairs",
            lambda name, queries: captioning(name, queries, one),
        ),
        task(
            "caption_two_objects",
            "caption_two",
            "pairs",
            lambda name, queries: captioning(name, queries, two),
        ),
        task(
            "vqa_accuracy",
            "vqa",
            "questions",
            lambda name, queries: question_answering(name, queries, asked),
        ),
        task(
            "video_direction_accuracy",
            "motion",
            "videos",
            lambda name, queries: captioning(name, queries, clips, direction_right),
        ),
    ]
    captions, questions = (
        tasks[0].benchmarks["seen"].queries,
        tasks[2].benchmarks["seen"].queries,
    )
    shapes = [example for example in questions if example.type.endswith("/shape")]
    few_shot: dict[str, OpenEnded | Classification] = {
        "captioning": captioning("captions", _first(captions, few_shot_limit), one),
        "vqa": question_answering("questions", _first(questions, few_shot_limit), asked),
    }
    if shapes:
        classes = sorted({example.answers[0] for example in shapes})
        support = [example for example in asked if example.question.startswith("what shape")]
        few_shot["classification"] = Classification(
            "shapes", _first(shapes, few_shot_limit), support, classes, prompts.QUESTION
        )
    pages: list[Page] = read_pages(_first(records("binding", "test", "pages"), limit), config)
    return Suite(tasks, Binding("new words", pages), few_shot)


def check_suite(suite: Suite, settings: Settings, few_shots: Sequence[int]) -> None:
    """Raises UserError where there are too few examples for a prompt of `run_suite`."""
    for asked in _asked(suite, settings, few_shots):
        for benchmark, how in asked.values():
            benchmark.check(how)


def run_suite(
    suite: Suite, engine: Engine, settings: Settings, few_shots: Sequence[int]
) -> Outcome:
    """Headline figures are zero-shot, with text-only examples before the query; few-shot
    figures have each of `few_shots`.
    """
    return Outcome(
        *(
            {key: benchmark.run(engine, how) for key, (benchmark, how) in asked.items()}
            for asked in _asked(suite, settings, few_shots)
        )
    )


def _asked(
    suite: Suite, settings: Settings, few_shots: Sequence[int]
) -> tuple[dict[Any, tuple[Benchmark, Settings]], ...]:
    """What is run and how, by the keys of an Outcome's three parts."""
    at = lambda shots: dataclasses.replace(settings, shots=shots)
    return (
        {
            (split, task.figure): (benchmark, settings)
            for task in suite.tasks
            for split, benchmark in task.benchmarks.items()
        },
        {shots: (suite.binding, at(shots)) for shots in BINDING_SHOTS},
        {
            (name, shots): (benchmark, at(shots))
            for name, benchmark in suite.few_shot.items()
            for shots in few_shots
        },
    )


def direction_right(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the word after "moving" is the first answer's."""
    said, true = (
        re.search(r"\bmoving (\w+)", metrics.normalise(text)) for text in (prediction, answers[0])
    )
    if true is None:
        raise UserError(
            f"the caption {answers[0]!r} tells of no direction: the data of this benchmark"
            " should say 'moving left'"
        )
    return float(said is not None and said[1] == true[1])


def figures(outcome: Outcome) -> dict[str, Any]:
    """The part of report.json that is one model's."""
    return {
        **{
            split: {figure: r.accuracy for (s, figure), r in outcome.headline.items() if s == split}
            for split in SPLITS
        },
        "binding_accuracy": {
            str(shots): result.accuracy for shots, result in outcome.binding.items()
        },
        "few_shot": _nested(
            {
                (name, str(shots)): result.accuracy
                for (name, shots), result in outcome.few_shot.items()
            }
        ),
        "vqa_by_type": {
            split: _by_type(outcome.headline[split, "vqa_accuracy"]) for split in SPLITS
        },
    }


def counts(outcome: Outcome) -> dict[str, Any]:
    """How many samples stand behind each figure."""
    return {
        **{
            split: {
                figure: len(r.samples) for (s, figure), r in outcome.headline.items() if s == split
            }
            for split in SPLITS
        },
        "binding_accuracy": {
            str(shots): len(result.samples) for shots, result in outcome.binding.items()
        },
        "few_shot": _nested(
            {
                (name, str(shots)): len(result.samples)
                for (name, shots), result in outcome.few_shot.items()
            }
        ),
    }


def _by_type(result: Result) -> dict[str, float]:
    return {
        key.removeprefix("accuracy/"): value for key, value in result.figures.items() if "/" in key
    }


def _nested(flat: dict[tuple[str, str], Any]) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {}
    for (outer, inner), value in flat.items():
        nested.setdefault(outer, {})[inner] = value
    return nested


def _first(items: Sequence[Any], limit: int) -> Any:
    """The first `limit` items, without reading the others; all of them for 0."""
    return [items[place] for place in range(min(limit, len(items)))] if limit else items


def _of_form(examples: Sequence[Example], form: str) -> list[Example]:
    return [example for example in examples if re.search(form, example.answers[0])]
