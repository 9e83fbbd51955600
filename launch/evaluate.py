"""Evaluates an exported Flamingo and writes report.json and report.html. All metrics are
fractions between 0 and 1.

    python -m launch.evaluate --model=EXPORT --output=FOLDER
    --benchmark=captioning:photos=data/photos:test --shots=0,4,8

A benchmark is KIND:NAME=DATASET[:SPLIT][,support=DATASET[:SPLIT]], with KIND one of
  captioning      pairs or videos; a caption scores 1 when it is one of the record's, word for
  word vqa             questions; VQA accuracy, beside what the most frequent answer of the training
  split would have classification  pairs, videos or questions whose answers are class names,
  ranked by log-likelihood binding         pages whose texts end with new words; which word
  names the last image
SPLIT is `test` if it is not given. The classes are all answers of the evaluated split and the
support set, or the lines of --classes=FILE. A model that was trained on questions is asked as
it was then; a Flamingo of pages and pairs is asked as in the paper, after two text-only
examples. Few-shot examples come from the support set, by default the dataset's own `train`
split.

    python -m launch.evaluate --suite=quickstart --data=runs/quickstart/data --model=EXPORT
    --baseline=EXPORT --output=FOLDER

runs the quickstart's suite. The baseline is a model trained without images: it is asked the
same with every image taken away.
"""

import dataclasses
import json
import pathlib
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import rich.table
from absl import flags
from rich.console import Console

from data_pipelines.features import dataset_folder, kind_of
from data_pipelines.records import open_records
from data_pipelines.transforms.examples import strings
from flamingo_jax.configuring import from_json
from flamingo_jax.errors import UserError
from flamingo_jax.evaluation import prompts, synthetic_world
from flamingo_jax.evaluation.benchmarks.benchmark import (
    Benchmark,
    BenchmarkResult,
    EvaluationSettings,
)
from flamingo_jax.evaluation.benchmarks.classification import Classification
from flamingo_jax.evaluation.benchmarks.fast_concept_binding import FastConceptBinding
from flamingo_jax.evaluation.benchmarks.open_ended import (
    OpenEnded,
    captioning,
    most_frequent_answer,
    question_answering,
)
from flamingo_jax.evaluation.examples import (
    BenchmarkExample,
    first_answer,
    read_examples,
    read_pages,
)
from flamingo_jax.evaluation.report import read_metrics, write_report
from flamingo_jax.evaluation.shots import draw
from flamingo_jax.experiment import Experiment, FlamingoConfig
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.generation import DecodingConfig
from flamingo_jax.inference.loading import LoadedFlamingo, flamingo_config, load_flamingo
from flamingo_jax.progress import Bar
from flamingo_jax.web_page import Table, cell
from launch import command
from launch.parts import TOTAL

KINDS = ("captioning", "vqa", "classification", "binding")
MODEL = flags.DEFINE_string("model", "", "Exported folder of a Flamingo.")
BASELINE = flags.DEFINE_string(
    "baseline", "", "Exported folder of a Flamingo trained without images."
)
OUTPUT = flags.DEFINE_string("output", "", "Folder for report.json and report.html.")
BENCHMARK = flags.DEFINE_multi_string(
    "benchmark", [], "KIND:NAME=DATASET[:SPLIT][,support=DATASET[:SPLIT]]."
)
SUITE = flags.DEFINE_enum("suite", None, ["quickstart"], "A set of benchmarks with its own report.")
DATA = flags.DEFINE_string("data", "", "suite: the folder that holds its datasets.")
SHOTS = flags.DEFINE_list(
    "shots",
    None,
    "Numbers of examples before the query; by default 0 for --benchmark, and 0, 4, 8, 16 and 32"
    " for the suite.",
)
SELECTION = flags.DEFINE_enum(
    "selection",
    "random",
    ["random", "rices"],
    "How few-shot examples are chosen: at random, or by likeness of their images.",
)
TEXT_EXAMPLES = flags.DEFINE_integer(
    "text_examples",
    None,
    "Text-only examples of zero-shot prompts; by default 2 (as in the paper), or 0 for a model"
    " trained on questions.",
    lower_bound=0,
)
QUESTION_PROMPT = flags.DEFINE_string(
    "question_prompt",
    None,
    "What stands between an image and the answer, with {question} in it, for --benchmark;"
    f" by default what the model was trained with, or '{prompts.QUESTION.text}'.",
)
BEAM = flags.DEFINE_integer(
    "beam_size", 3, "Hypotheses of beam search (paper: 3); 1 is greedy.", lower_bound=1
)
CAPTION_PROMPT = flags.DEFINE_string(
    "caption_prompt",
    prompts.CAPTION.text,
    "What stands between an image and its caption or class, for --benchmark (paper: Output:);"
    " empty for models that have met captions right after their images alone, as in plain"
    " pairs.",
)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 24, "Tokens of an answer at most.", lower_bound=1)
LIMIT = flags.DEFINE_integer(
    "limit", 0, "Records of each benchmark at most, drawn by --seed; 0 for all.", lower_bound=0
)
SUPPORT_LIMIT = flags.DEFINE_integer(
    "support_limit",
    2048,
    "Records of a support set at most, drawn by --seed (paper: 2048); 0 for all.",
    lower_bound=0,
)
CLASSES = flags.DEFINE_string(
    "classes", "", "classification: text file of the class names, one a line."
)
FRAMES = flags.DEFINE_integer(
    "frames",
    None,
    "Frames of a clip at most, from its middle; by default as many as the model was trained with.",
    lower_bound=1,
)
FPS = flags.DEFINE_float(
    "fps",
    None,
    "Frames a second of clips; by default what was stored, as in training (paper: --fps=3"
    " --frames=30).",
    lower_bound=1e-3,
)
FEW_SHOT_LIMIT = flags.DEFINE_integer(
    "few_shot_limit", 64, "suite: records of each few-shot metric at most.", lower_bound=1
)
ROWS = flags.DEFINE_integer("rows", 64, "Prompts in a batch at most.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the choice of examples.", lower_bound=0)
SECONDS = flags.DEFINE_string("seconds", "", "JSON file {stage: seconds} for the report.")
CURVES = flags.DEFINE_multi_string(
    "curves",
    [],
    "NAME=metrics.jsonl of a stage whose losses the report shows beside the model's own.",
)


def main() -> int:
    for name, value in (("model", MODEL.value), ("output", OUTPUT.value)):
        if not value:
            raise UserError(f"--{name} is not set: see `python -m launch.evaluate --help`")
    if bool(SUITE.value) == bool(BENCHMARK.value):
        raise UserError("name either --suite or at least one --benchmark, not both")
    if SUITE.value and not DATA.value:
        raise UserError("--data is not set: name the folder that holds the suite's datasets")
    text_examples = (
        TEXT_EXAMPLES.value
        if TEXT_EXAMPLES.value is not None
        else 0
        if _trained_prompts()
        else EvaluationSettings.text_examples
    )
    settings = EvaluationSettings(
        text_examples=text_examples,
        selection=SELECTION.value,
        seed=SEED.value,
        decoding=DecodingConfig(max_tokens=MAX_TOKENS.value, beam_size=BEAM.value),
    )
    began = time.monotonic()
    seconds = _read_json(pathlib.Path(SECONDS.value)) if SECONDS.value else {}
    curves = _curves()
    (run_suite if SUITE.value else run_benchmarks)(settings, seconds, curves, began)
    print(f"wrote {OUTPUT.value}/report.json and {OUTPUT.value}/report.html")
    return 0


def run_suite(
    settings: EvaluationSettings, seconds: dict[str, float], curves: dict[str, Any], began: float
) -> None:
    """The quickstart's suite for the model and, if there is one, the baseline."""
    records: synthetic_world.ReadRecords = lambda name, split, kind: open_records(
        pathlib.Path(DATA.value) / name, split, kind
    )
    few_shots = _shots([0, 4, 8, 16, 32])
    suite = synthetic_world.read_suite(
        records, _config(), limit=LIMIT.value, few_shot_limit=FEW_SHOT_LIMIT.value
    )
    synthetic_world.check_suite(suite, settings, few_shots)
    model, baseline = _load()
    result = synthetic_world.run_suite(
        suite, Engine(model, batch_size=ROWS.value), settings, few_shots
    )
    baseline_result = (
        synthetic_world.run_suite(
            suite, Engine(baseline, with_visuals=False, batch_size=ROWS.value), settings, few_shots
        )
        if baseline
        else None
    )
    mine, theirs = (
        synthetic_world.metrics_of(result),
        synthetic_world.metrics_of(baseline_result) if baseline_result else None,
    )
    report = mine | {
        "without_images": theirs,
        "counts": synthetic_world.prediction_counts(result),
        "seconds": _with_evaluation(seconds, time.monotonic() - began),
        **_about(model, baseline, settings),
    }
    other: Any = theirs or {}
    headline = [
        [
            metric,
            *(mine[split][metric] for split in synthetic_world.SPLITS),
            *(other.get(split, {}).get(metric) for split in synthetic_world.SPLITS),
        ]
        for metric in mine["seen"]
    ]
    columns = [
        "seen pairs",
        "unseen pairs",
        "seen, without images",
        "unseen, without images",
    ]
    types = sorted({t for split in synthetic_world.SPLITS for t in mine["vqa_by_type"][split]})
    by_type = [
        [
            t,
            *(
                part.get("vqa_by_type", {}).get(split, {}).get(t)
                for part in (mine, other)
                for split in synthetic_world.SPLITS
            ),
        ]
        for t in types
    ]
    shots = [str(n) for n in synthetic_world.BINDING_SHOTS]
    binding = [
        [name, *(part["binding_accuracy"][n] for n in shots)] for name, part in _named(mine, theirs)
    ]
    few = [
        [f"{task}, {name}", *part["few_shot"][task].values()]
        for name, part in _named(mine, theirs)
        for task in part["few_shot"]
    ]
    accuracy = {
        name: ([int(n) for n in shots], list(part["binding_accuracy"].values()))
        for name, part in _named(mine, theirs)
    }
    write_report(
        pathlib.Path(OUTPUT.value),
        report,
        title="Flamingo on the synthetic world",
        tables=[
            Table("New images, zero-shot", ["", *columns], headline),
            Table("A word bound in the prompt, 2-way, by shots", ["", *shots], binding),
            Table("Few-shot, by shots", ["", *map(str, few_shots)], few),
            Table("Questions by type", ["", *columns], by_type),
            Table(
                "Wall time",
                ["stage", "seconds"],
                [[name, f"{value:.0f}"] for name, value in report["seconds"].items()],
            ),
        ],
        results=[
            (f"{split} pairs: {metric}", result)
            for (split, metric), result in result.headline.items()
        ]
        + [(f"new words, {n} shots", result.concept_binding[n]) for n in (4,)],
        training=curves,
        lines={"new words: accuracy by shots": accuracy},
    )


def _shots(default: list[int]) -> list[int]:
    if SHOTS.value is None:
        return default
    try:
        shots = [int(text) for text in SHOTS.value]
    except ValueError as error:
        raise UserError(
            f"--shots={','.join(SHOTS.value)} must be numbers with commas between them, as in 0,4,8"
        ) from error
    if not shots or min(shots) < 0:
        raise UserError(f"--shots={','.join(SHOTS.value)} must be numbers from 0 up")
    return shots


def run_benchmarks(
    settings: EvaluationSettings, seconds: dict[str, float], curves: dict[str, Any], began: float
) -> None:
    """Every --benchmark at every number of --shots."""
    shots, config = _shots([0]), _config()
    benchmarks = [
        make_benchmark(text, config, max(shots), settings.text_examples) for text in BENCHMARK.value
    ]
    for place, benchmark in enumerate(benchmarks):
        if benchmark.name in (other.name for other in benchmarks[:place]):
            raise UserError(
                f"two benchmarks are named {benchmark.name!r}, under which the report has one:"
                " give each --benchmark its own NAME"
            )
        for n in shots:
            benchmark.check(dataclasses.replace(settings, shots=n))
    model, baseline = _load()
    engines = {"model": Engine(model, batch_size=ROWS.value)}
    if baseline:
        engines["without_images"] = Engine(baseline, with_visuals=False, batch_size=ROWS.value)
    results: dict[str, list[BenchmarkResult]] = {
        name: [
            b.run(engine, dataclasses.replace(settings, shots=n)) for b in benchmarks for n in shots
        ]
        for name, engine in engines.items()
    }
    metrics = {
        name: {
            b.name: {str(r.shots): r.metrics for r in some if r.name == b.name} for b in benchmarks
        }
        for name, some in results.items()
    }
    report = {
        "benchmarks": metrics["model"],
        "without_images": metrics.get("without_images"),
        "majority_answers": {
            b.name: b.majority_answer
            for b in benchmarks
            if isinstance(b, OpenEnded) and b.majority_answer
        },
        "counts": {
            b.name: {str(r.shots): len(r.predictions) for r in results["model"] if r.name == b.name}
            for b in benchmarks
        },
        "seconds": _with_evaluation(seconds, time.monotonic() - began),
        "drawn": {
            "limit": LIMIT.value,
            "support_limit": SUPPORT_LIMIT.value,
            "frames": FRAMES.value,
            "fps": FPS.value,
        },
        **_about(model, baseline, settings),
    }
    rows = [
        [
            f"{r.name}, {who}",
            r.shots,
            r.accuracy,
            r.metrics.get("majority_answer"),
            len(r.predictions),
        ]
        for who, some in results.items()
        for r in some
    ]
    header = ["benchmark", "shots", "accuracy", "majority answer", "queries"]
    print_table(header, rows)
    write_report(
        pathlib.Path(OUTPUT.value),
        report,
        title=f"Evaluation of {MODEL.value}",
        tables=[Table("Accuracy", header, rows)],
        results=[(f"{result.name}, {result.shots} shots", result) for result in results["model"]],
        training=curves,
    )


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """The report's table for whoever watches."""
    table = rich.table.Table(*header)
    for row in rows:
        table.add_row(*map(cell, row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def make_benchmark(text: str, config: FlamingoConfig, shots: int, text_examples: int) -> Benchmark:
    """The benchmark that a --benchmark describes, with its data read."""
    match = re.fullmatch(r"(\w+):([^=]+)=([^,]+?)(?:,support=([^,]+))?", text)
    if not match or match[1] not in KINDS:
        raise UserError(
            f"--benchmark={text} must be KIND:NAME=DATASET[:SPLIT][,support=DATASET[:SPLIT]]"
            f" with KIND one of {', '.join(KINDS)}"
        )
    kind, name, place, support_place = match.groups()
    path, split = _path_and_split(place, "test")
    if kind == "binding":
        pages = open_records(path, split, "pages")
        return FastConceptBinding(name, read_pages(_drawn(pages, path, split, LIMIT.value), config))
    queries = _examples(path, split, config, LIMIT.value)
    support: list[BenchmarkExample] = []
    if support_place or shots or (text_examples and kind != "classification"):
        support = _examples(
            *_path_and_split(support_place or path, "train"), config, SUPPORT_LIMIT.value
        )
    if kind == "captioning":
        return captioning(
            name, queries, support, template=prompts.PromptTemplate(CAPTION_PROMPT.value)
        )
    asking = _question_template()
    if kind == "vqa":
        return question_answering(
            name,
            queries,
            support,
            asking,
            _majority_answer(*_path_and_split(support_place or path, "train")),
        )
    classes = _classes(path, split, support)
    template = (
        asking
        if any(query.question for query in queries)
        else prompts.PromptTemplate(CAPTION_PROMPT.value)
    )
    return Classification(name, queries, support, classes, template)


def _question_template() -> prompts.PromptTemplate:
    """How questions are asked: as --question_prompt says, or as the model was trained to be."""
    trained = _trained_prompts()
    if QUESTION_PROMPT.value is None and len(trained) > 1:
        listed = ", ".join(map(repr, trained))
        raise UserError(
            f"the model was trained with several prompts ({listed}): choose one with"
            " --question_prompt"
        )
    template = (
        QUESTION_PROMPT.value
        if QUESTION_PROMPT.value is not None
        else trained[0]
        if trained
        else prompts.QUESTION.text
    )
    if "{question}" not in template:
        raise UserError(
            f"--question_prompt={template!r} has no {{question}} in it, so that nothing would"
            " be asked: write it in"
        )
    return prompts.PromptTemplate(template)


def _trained_prompts() -> list[str]:
    """The different prompts of the questions that the model was trained on, as far as its
    export tells.
    """
    file = pathlib.Path(MODEL.value) / "experiment.json"
    if not file.is_file():
        return []
    experiment = from_json(Experiment, _read_json(file))
    return sorted(
        {dataset.prompt for dataset in experiment.data.values() if dataset.kind == "questions"}
    )


def _majority_answer(path: str, split: str) -> str:
    """The most frequent answer of a split, "" where the dataset lacks it."""
    import tensorflow_datasets as tfds

    if split not in tfds.builder_from_directory(str(dataset_folder(path))).info.splits:
        return ""
    records = open_records(path, split, "questions")
    return most_frequent_answer(strings(records[place]["answers"]) for place in range(len(records)))


def _examples(path: str, split: str, config: FlamingoConfig, most: int) -> list[BenchmarkExample]:
    kind, records = _open(path, split)
    drawn = _drawn(records, path, split, most)
    return read_examples(drawn, kind, config, frames=FRAMES.value, fps=FPS.value)


def _open(path: str, split: str) -> tuple[str, Sequence[Any]]:
    """A dataset's kind and the records of a split.

    Raises UserError where it holds no examples.
    """
    import tensorflow_datasets as tfds

    kind = kind_of(tfds.builder_from_directory(str(dataset_folder(path))).info.features)
    if kind not in ("pairs", "videos", "questions"):
        raise UserError(
            f"the dataset {path} holds {kind}, but pairs, videos or questions are needed"
        )
    return kind, open_records(path, split, kind)


def _classes(path: str, split: str, support: Sequence[BenchmarkExample]) -> list[str]:
    """Every class that could be the answer, however few records are asked about."""
    if CLASSES.value:
        try:
            lines = pathlib.Path(CLASSES.value).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--classes={CLASSES.value} cannot be read as text ({error}): name a file of"
                " class names"
            ) from error
        classes = [line.strip() for line in lines if line.strip()]
        if twice := [name for name, count in Counter(classes).items() if count > 1]:
            raise UserError(
                f"--classes={CLASSES.value} has {twice[0]!r} more than once: give each class a"
                " name of its own"
            )
        if not classes:
            raise UserError(f"--classes={CLASSES.value} holds no class: write one a line")
        return classes
    kind, records = _open(path, split)
    with Bar(f"classes of {path}", len(records)) as bar:
        answers = set()
        for place in range(len(records)):
            answers.add(first_answer(records[place], kind))
            bar.advance()
    return sorted(
        {answer for answer in answers if answer} | {example.answers[0] for example in support}
    )


def _path_and_split(text: str, default: str) -> tuple[str, str]:
    path, _, split = text.partition(":")
    return path, split or default


def _drawn(records: Sequence[Any], path: str, split: str, most: int) -> list[Any]:
    return [records[place] for place in draw(SEED.value, f"{path}:{split}", len(records), most)]


def _config() -> FlamingoConfig:
    """The model's.

    The baseline is opened as well, so that a wrong folder is said before any work.
    """
    if BASELINE.value:
        flamingo_config(BASELINE.value)
    return flamingo_config(MODEL.value)


def _load() -> tuple[LoadedFlamingo, LoadedFlamingo | None]:
    """The model and the baseline, if there is one."""
    return load_flamingo(MODEL.value), load_flamingo(BASELINE.value) if BASELINE.value else None


def _about(
    model: LoadedFlamingo, baseline: LoadedFlamingo | None, settings: EvaluationSettings
) -> dict[str, Any]:
    return {
        "metrics_are": "fractions between 0 and 1",
        "model": {"folder": MODEL.value, "digest": model.digest},
        "baseline": {"folder": BASELINE.value, "digest": baseline.digest} if baseline else None,
        "settings": dataclasses.asdict(settings),
    }


def _named(mine: Any, theirs: Any) -> list[tuple[str, Any]]:
    return [("model", mine)] + ([("without images", theirs)] if theirs else [])


def _curves() -> dict[str, list[dict[str, Any]]]:
    """Metrics of the model's own training, of the baseline's, and of --curves."""
    files = {}
    for text in CURVES.value:
        name, _, path = text.partition("=")
        if not pathlib.Path(path).is_file():
            raise UserError(f"--curves={text} must be NAME=FILE with a metrics.jsonl that is there")
        files[name] = pathlib.Path(path)
    files["flamingo"] = pathlib.Path(MODEL.value) / "metrics.jsonl"
    if BASELINE.value:
        files["without images"] = pathlib.Path(BASELINE.value) / "metrics.jsonl"
    return {name: read_metrics(file) for name, file in files.items()}


def _with_evaluation(seconds: dict[str, float], evaluation: float) -> dict[str, float]:
    """Wall seconds by stage, with the evaluation's own among them and in their total, if they
    have one.
    """
    total = {TOTAL: seconds[TOTAL] + evaluation} if TOTAL in seconds else {}
    return (
        {name: value for name, value in seconds.items() if name != TOTAL}
        | {"evaluation": evaluation}
        | total
    )


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): write it again") from error


if __name__ == "__main__":
    command.run(main)
