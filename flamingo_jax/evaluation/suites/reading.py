"""Opens what a suite runs: benchmarks in their official files, and own datasets that
`launch.evaluate --benchmark` describes.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import PAPER_SHOTS, BenchmarkSet
from flamingo_jax.evaluation.benchmarks.opening import MissingMedia, open_benchmark
from flamingo_jax.evaluation.prompts import QUESTION, question_template
from flamingo_jax.evaluation.protocol.benchmark import Benchmark
from flamingo_jax.evaluation.protocol.classification import Classification
from flamingo_jax.evaluation.protocol.fast_concept_binding import FastConceptBinding
from flamingo_jax.evaluation.protocol.open_ended import OpenEnded
from flamingo_jax.evaluation.suites.cells import SuiteBenchmark, digest
from flamingo_jax.evaluation.suites.description import BenchmarkDescription
from flamingo_jax.evaluation.suites.own_datasets import BenchmarkReader

OPEN_TEXT_EXAMPLES = 2
"""Text-only examples of open-ended zero-shot prompts (paper 3.3)."""
OWN_SCORERS = {
    "captioning": "captions",
    "vqa": "own_answers",
    "classification": "top_k",
    "binding": "top_k",
}
"""{kind of an own dataset: its metric}."""


@dataclasses.dataclass(frozen=True)
class OpeningOptions:
    """How official files are opened.

    root: has a folder for each benchmark, by its name.
    folders: {benchmark: its folder}, where it is elsewhere.
    split, support_split: "" for the paper's.
    limit, support_limit: the most queries and support examples, drawn by `seed`; 0 for all.
    missing_media: what is done about examples whose image is not there.
    text_examples: of zero-shot prompts; None for the benchmark's own number.
    trained_on_questions: whether the model was trained on questions: by default it gets no
      text-only examples before one, since there were none in training.
    question_prompt: in place of the paper's, with {question}; None for the paper's.
    max_tokens: of answers; None for the benchmark's own number.
    wordnet: folder of WordNet 3.0's files, where a metric reads them; "" for one that is found.
    """

    root: str = ""
    folders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    split: str = ""
    support_split: str = ""
    limit: int = 0
    support_limit: int = 2048
    seed: int = 0
    missing_media: MissingMedia = "error"
    text_examples: int | None = None
    trained_on_questions: bool = False
    question_prompt: str | None = None
    max_tokens: int | None = None
    wordnet: str = ""


def open_official(
    benchmarks: Sequence[BenchmarkSet], options: OpeningOptions
) -> list[SuiteBenchmark]:
    """Reads the official files of benchmarks.

    Raises: UserError for a folder or file that is missing, all of them before any is read.
    """
    folders = {one.name: _folder(one, options) for one in benchmarks}
    absent = [one for one in benchmarks if not folders[one.name].is_dir()]
    if absent:
        listed = ", ".join(str(folders[one.name]) for one in absent)
        raise UserError(
            f"there is no folder {listed}: put the official files of"
            f" {', '.join(one.name for one in absent)} there (python -m launch.evaluate --layout"
            " lists them), or leave them out of --suite"
        )
    return [_official(one, folders[one.name], options) for one in benchmarks]


def _folder(benchmark: BenchmarkSet, options: OpeningOptions) -> pathlib.Path:
    given = options.folders.get(benchmark.name)
    return pathlib.Path(given) if given else pathlib.Path(options.root, benchmark.name)


def _official(
    benchmark: BenchmarkSet, folder: pathlib.Path, options: OpeningOptions
) -> SuiteBenchmark:
    given = options.question_prompt
    if given is not None and benchmark.template == QUESTION:
        benchmark = dataclasses.replace(benchmark, template=question_template(given))
    opened = open_benchmark(
        benchmark,
        folder,
        split=options.split,
        support_split=options.support_split,
        limit=options.limit,
        support_limit=options.support_limit,
        seed=options.seed,
        missing_media=options.missing_media,
        wordnet=options.wordnet,
    )
    generates = benchmark.kind == "generate"
    own = benchmark.text_examples
    texts = (OPEN_TEXT_EXAMPLES if generates else 0) if own is None else own
    if options.trained_on_questions and "{question}" in benchmark.template.text:
        texts = 0
    return SuiteBenchmark(
        asked=opened.asked,
        title=benchmark.title,
        scorer=benchmark.scorer,
        scorer_options=benchmark.scorer_options,
        drawn={
            "split": opened.split,
            "support_split": opened.support_split,
            "limit": options.limit,
            "support_limit": benchmark.per_class or options.support_limit,
            "drawn_by": options.seed,
        },
        references=opened.references,
        missing={
            "policy": options.missing_media,
            **{name: len(ids) for name, ids in opened.missing.items()},
        },
        shots=benchmark.shots,
        text_examples=texts if options.text_examples is None else options.text_examples,
        max_tokens=options.max_tokens or benchmark.max_tokens,
        video=benchmark.video,
        generates=generates,
        official=benchmark,
    )


def open_described(
    descriptions: Sequence[BenchmarkDescription],
    reader: BenchmarkReader,
    *,
    shots: int,
    text_examples: int | None,
    max_tokens: int,
) -> list[SuiteBenchmark]:
    """Reads own datasets.

    shots: the most that will be asked for.
    text_examples: of open-ended zero-shot prompts; None for two, or none before a question to a
      model that was trained on questions.
    max_tokens: of answers.

    Raises: UserError for two benchmarks of one name, a dataset of the wrong kind, or a file that
      cannot be read.
    """
    names = [one.name for one in descriptions]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(
            f"two benchmarks are named {twice[0]!r}, under which the report has one: give each"
            " --benchmark its own NAME"
        )
    found = []
    for one in descriptions:
        texts = text_examples
        if texts is None:
            texts = 0 if one.kind == "vqa" and reader.trained_prompts else OPEN_TEXT_EXAMPLES
        asked = reader.read(one, shots, texts)
        generates = isinstance(asked, OpenEnded)
        majority = asked.majority_answer if isinstance(asked, OpenEnded) else ""
        options: dict[str, Any] = {"majority_answer": majority} if one.kind == "vqa" else {}
        found.append(
            SuiteBenchmark(
                asked=asked,
                title=one.name,
                scorer=OWN_SCORERS[one.kind],
                scorer_options=options | ({"exact": True} if one.kind == "captioning" else {}),
                drawn={
                    "split": one.split,
                    "support_split": one.support_split,
                    "limit": reader.limit,
                    "support_limit": reader.support_limit,
                    "drawn_by": reader.seed,
                    "data": [one.path, one.support_path],
                    "fps": reader.fps,
                },
                references={f"{one.path}:{one.split}": _identity(asked)},
                missing={"policy": "error", "queries": 0, "support": 0},
                shots=PAPER_SHOTS,
                text_examples=texts if generates else 0,
                max_tokens=max_tokens,
                video=False,
                generates=generates,
            )
        )
    return found


def _identity(asked: Benchmark) -> str:
    """Identifies an own dataset's queries by their ids and ground truths."""
    if isinstance(asked, OpenEnded | Classification):
        return digest([[one.id, list(one.answers)] for one in asked.queries])
    assert isinstance(asked, FastConceptBinding)
    return digest([[page.id, list(page.texts)] for page in asked.pages])
