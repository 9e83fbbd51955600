"""The quickstart's benchmark suite on the synthetic world: captioning, question answering,
motion in clips and fast concept binding.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation import prompts
from flamingo_jax.evaluation.examples import (
    BenchmarkExample,
    page_examples,
    read_examples,
    read_pages,
)
from flamingo_jax.evaluation.metrics.exact_match import normalise
from flamingo_jax.evaluation.protocol.benchmark import (
    Benchmark,
    BenchmarkResult,
    EvaluationSettings,
)
from flamingo_jax.evaluation.protocol.classification import Classification
from flamingo_jax.evaluation.protocol.fast_concept_binding import FastConceptBinding
from flamingo_jax.evaluation.protocol.open_ended import (
    OpenEnded,
    captioning,
    question_answering,
)
from flamingo_jax.inference.engine import Engine

SPLITS = {"seen": "test", "unseen": "unseen"}
"""Name in reports -> split. Images of `unseen` show only colour-shape pairs that no training
image shows.
"""
BINDING_SHOTS = (1, 2, 4, 8, 16, 32)

ReadRecords = Callable[[str, str, str], Sequence[Any]]
"""(dataset, split, kind) -> records."""


@dataclasses.dataclass(frozen=True)
class SyntheticWorldSuite:
    """The benchmarks of the suite, all data read before any model is loaded.

    headline: zero-shot benchmarks by (split, metric).
    concept_binding: fast concept binding, run at `BINDING_SHOTS`.
    few_shot: benchmarks by name, run at several numbers of shots.
    """

    headline: dict[tuple[str, str], OpenEnded]
    concept_binding: FastConceptBinding
    few_shot: dict[str, OpenEnded | Classification]


@dataclasses.dataclass(frozen=True)
class SuiteResult:
    """One model's results.

    headline: by (split, metric). concept_binding: by shots. few_shot: by (benchmark, shots).
    """

    headline: dict[tuple[str, str], BenchmarkResult]
    concept_binding: dict[int, BenchmarkResult]
    few_shot: dict[tuple[str, int], BenchmarkResult]


def read_suite(records: ReadRecords, *, limit: int, few_shot_limit: int) -> SyntheticWorldSuite:
    """Reads queries from the evaluation sets, and support examples from the validation splits
    of the training sets.

    Args:
      limit: the most queries of a headline benchmark; 0 for all.
      few_shot_limit: the most queries of a few-shot benchmark; 0 for all.
    """
    pairs = read_examples(records("ltip", "validation", "pairs"), "pairs")
    clips = read_examples(records("vtp", "validation", "videos"), "videos")
    pages = read_pages(records("m3w", "validation", "pages"))
    asked = [example for example in page_examples(pages) if example.question]
    one, two = _matching(pairs, r" at the "), _matching(pairs, r" (left of|above) ")
    headline: dict[tuple[str, str], OpenEnded] = {}
    for name, split in SPLITS.items():

        def examples(dataset: str, kind: str, split: str = split) -> list[BenchmarkExample]:
            found = _first(records(dataset, split, kind), limit)
            return _first(read_examples(found, kind), limit)

        headline |= {
            (name, "caption_one_object"): captioning(
                f"caption_one, {name}", examples("caption_one", "pairs"), one
            ),
            (name, "caption_two_objects"): captioning(
                f"caption_two, {name}", examples("caption_two", "pairs"), two
            ),
            (name, "vqa_accuracy"): question_answering(
                f"vqa, {name}", examples("vqa", "questions"), asked
            ),
            (name, "video_direction_accuracy"): captioning(
                f"motion, {name}", examples("motion", "videos"), clips, direction_match
            ),
        }
    captions = headline["seen", "caption_one_object"].queries
    questions = headline["seen", "vqa_accuracy"].queries
    few_shot: dict[str, OpenEnded | Classification] = {
        "captioning": captioning("captions", _first(captions, few_shot_limit), one),
        "vqa": question_answering("questions", _first(questions, few_shot_limit), asked),
    }
    shapes = [example for example in questions if example.question_type.endswith("/shape")]
    if shapes:
        classes = sorted({example.answers[0] for example in shapes})
        support = [example for example in asked if example.question.startswith("what shape")]
        few_shot["classification"] = Classification(
            "shapes", _first(shapes, few_shot_limit), support, classes, prompts.QUESTION
        )
    binding = read_pages(_first(records("binding", "test", "pages"), limit))
    return SyntheticWorldSuite(headline, FastConceptBinding("new words", binding), few_shot)


def check_suite(
    suite: SyntheticWorldSuite, settings: EvaluationSettings, few_shots: Sequence[int]
) -> None:
    """Raises UserError where a benchmark has too few examples for `run_suite`."""
    for runs in _runs(suite, settings, few_shots):
        for benchmark, how in runs.values():
            benchmark.check(how)


def run_suite(
    suite: SyntheticWorldSuite,
    engine: Engine,
    settings: EvaluationSettings,
    few_shots: Sequence[int],
) -> SuiteResult:
    """Runs every benchmark: the headline ones zero-shot with text-only examples, the few-shot
    ones at each number of shots in `few_shots`.
    """
    return SuiteResult(
        *(
            {key: benchmark.run(engine, how) for key, (benchmark, how) in runs.items()}
            for runs in _runs(suite, settings, few_shots)
        )
    )


def _runs(
    suite: SyntheticWorldSuite, settings: EvaluationSettings, few_shots: Sequence[int]
) -> tuple[dict[Any, tuple[Benchmark, EvaluationSettings]], ...]:
    """Returns (benchmark, settings) of every run, by the keys of SuiteResult's fields."""

    def with_shots(shots: int) -> EvaluationSettings:
        return dataclasses.replace(settings, shots=shots)

    return (
        {key: (benchmark, settings) for key, benchmark in suite.headline.items()},
        {shots: (suite.concept_binding, with_shots(shots)) for shots in BINDING_SHOTS},
        {
            (name, shots): (benchmark, with_shots(shots))
            for name, benchmark in suite.few_shot.items()
            for shots in few_shots
        },
    )


def direction_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 where prediction and first answer have the same word after "moving"."""
    said, true = (
        re.search(r"\bmoving (\w+)", normalise(text)) for text in (prediction, answers[0])
    )
    if true is None:
        raise UserError(
            f"the caption {answers[0]!r} tells of no direction: the data of this benchmark"
            " should say 'moving left'"
        )
    return float(said is not None and said[1] == true[1])


def metrics_of(result: SuiteResult) -> dict[str, Any]:
    """Arranges one model's accuracies as report.json has them."""
    return _laid_out(result, lambda one: one.accuracy) | {
        "vqa_by_type": {
            split: _by_type(result.headline[split, "vqa_accuracy"]) for split in SPLITS
        },
    }


def prediction_counts(result: SuiteResult) -> dict[str, Any]:
    """Counts the predictions behind each metric, arranged as in `metrics_of`."""
    return _laid_out(result, lambda one: len(one.predictions))


def _laid_out(result: SuiteResult, value: Callable[[BenchmarkResult], Any]) -> dict[str, Any]:
    """Arranges `value(result)` of each benchmark as report.json has it."""
    few_shot: dict[str, dict[str, Any]] = {}
    for (name, shots), one in result.few_shot.items():
        few_shot.setdefault(name, {})[str(shots)] = value(one)
    return {
        **{
            split: {
                metric: value(one) for (s, metric), one in result.headline.items() if s == split
            }
            for split in SPLITS
        },
        "binding_accuracy": {
            str(shots): value(one) for shots, one in result.concept_binding.items()
        },
        "few_shot": few_shot,
    }


def _by_type(result: BenchmarkResult) -> dict[str, float]:
    return {
        key.removeprefix("accuracy/"): value for key, value in result.metrics.items() if "/" in key
    }


def _first(items: Sequence[Any], limit: int) -> Any:
    """Takes the first `limit` items without reading the others; all of them for 0."""
    return [items[place] for place in range(min(limit, len(items)))] if limit else items


def _matching(examples: Sequence[BenchmarkExample], pattern: str) -> list[BenchmarkExample]:
    return [example for example in examples if re.search(pattern, example.answers[0])]
