"""Evaluates an exported Flamingo and writes report.json and report.html. All figures are fractions between 0 and 1.

    python -m launch.evaluate --model=EXPORT --output=FOLDER --benchmark=captioning:photos=data/photos:test --shots=0,4,8

A benchmark is KIND:NAME=DATASET[:SPLIT][,support=DATASET[:SPLIT]], with KIND one of
  captioning      pairs or videos; a caption is right when it is one of the record's, word for word
  vqa             questions; VQA accuracy
  classification  pairs, videos or questions whose answers are class names, ranked by log-likelihood
  binding         pages whose texts end with new words; which word names the last picture
SPLIT is `test` if it is not given. Few-shot examples come from the support set, by default the dataset's own `train` split.

    python -m launch.evaluate --suite=quickstart --data=runs/quickstart/data --model=EXPORT --baseline=EXPORT --output=FOLDER

runs the quickstart's suite. The baseline is a model trained without pictures: it is asked the same with every picture taken away.
"""

import dataclasses
import json
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from data_pipelines.features import kind_of
from data_pipelines.records import open_records
from flamingo_jax.errors import UserError
from flamingo_jax.evaluation import drawn_world, prompts
from flamingo_jax.evaluation.benchmarks import Benchmark, Binding, Classification, Result, Settings, captioning, question_answering
from flamingo_jax.evaluation.examples import Example, read_examples, read_pages
from flamingo_jax.evaluation.report import read_metrics, write_report
from flamingo_jax.experiment import FlamingoConfig
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.generation import Decoding
from flamingo_jax.inference.model import Loaded, flamingo_config, load_flamingo
from flamingo_jax.web_page import Table
from launch import command
from launch.parts import TOTAL

KINDS = ("captioning", "vqa", "classification", "binding")
MODEL = flags.DEFINE_string("model", "", "Exported folder of a Flamingo.")
BASELINE = flags.DEFINE_string("baseline", "", "Exported folder of a Flamingo trained without pictures.")
OUTPUT = flags.DEFINE_string("output", "", "Folder for report.json and report.html.")
BENCHMARK = flags.DEFINE_multi_string("benchmark", [], "KIND:NAME=DATASET[:SPLIT][,support=DATASET[:SPLIT]].")
SUITE = flags.DEFINE_enum("suite", None, ["quickstart"], "A set of benchmarks with its own report.")
DATA = flags.DEFINE_string("data", "", "suite: the folder that holds its datasets.")
SHOTS = flags.DEFINE_list("shots", None, "Numbers of examples before the query; by default 0 for --benchmark, and 0, 4, 8, 16 and 32 for the suite.")
SELECTION = flags.DEFINE_enum("selection", "random", ["random", "rices"], "How few-shot examples are chosen: at random, or by likeness of their pictures.")
TEXT_EXAMPLES = flags.DEFINE_integer("text_examples", 2, "Text-only examples of zero-shot prompts (paper: 2).", lower_bound=0)
BEAM = flags.DEFINE_integer("beam", 3, "Hypotheses of beam search (paper: 3); 1 is greedy.", lower_bound=1)
CAPTION_PROMPT = flags.DEFINE_string(
    "caption_prompt", prompts.CAPTION.template, "What stands between a picture and its caption or class, for --benchmark (paper: Output:); empty for models "
    "that have met captions right after their pictures alone, as in plain pairs.",
)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 24, "Tokens of an answer at most.", lower_bound=1)
LIMIT = flags.DEFINE_integer("limit", 0, "Records of each benchmark at most; 0 for all.", lower_bound=0)
FEW_SHOT_LIMIT = flags.DEFINE_integer("few_shot_limit", 64, "suite: records of each few-shot figure at most.", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", 64, "Prompts in a batch at most.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the choice of examples.")
SECONDS = flags.DEFINE_string("seconds", "", "JSON file {stage: seconds} for the report.")
CURVES = flags.DEFINE_multi_string("curves", [], "NAME=metrics.jsonl of a stage whose losses the report shows beside the model's own.")


def main() -> int:
    for name, value in (("model", MODEL.value), ("output", OUTPUT.value)):
        if not value:
            raise UserError(f"--{name} is not set: see `python -m launch.evaluate --help`")
    if bool(SUITE.value) == bool(BENCHMARK.value):
        raise UserError("name either --suite or at least one --benchmark, not both")
    if SUITE.value and not DATA.value:
        raise UserError("--data is not set: name the folder that holds the suite's datasets")
    settings = Settings(
        text_examples=TEXT_EXAMPLES.value, selection=SELECTION.value, seed=SEED.value, decoding=Decoding(max_tokens=MAX_TOKENS.value, beam=BEAM.value)
    )
    began = time.monotonic()
    seconds = _json_file(SECONDS.value) if SECONDS.value else {}
    curves = _curves()
    (run_suite if SUITE.value else run_benchmarks)(settings, seconds, curves, began)
    print(f"wrote {OUTPUT.value}/report.json and {OUTPUT.value}/report.html")
    return 0


def run_suite(settings: Settings, seconds: dict[str, float], curves: dict[str, Any], began: float) -> None:
    """The quickstart's suite for the model and, if there is one, the baseline."""
    records: drawn_world.ReadRecords = lambda name, split, kind: open_records(pathlib.Path(DATA.value) / name, split, kind)
    few_shots = _shots([0, 4, 8, 16, 32])
    suite = drawn_world.read_suite(records, _config(), limit=LIMIT.value, few_shot_limit=FEW_SHOT_LIMIT.value)
    drawn_world.check_suite(suite, settings, few_shots)
    model, baseline = _load()
    outcome = drawn_world.run_suite(suite, Engine(model, rows=ROWS.value), settings, few_shots)
    blind = drawn_world.run_suite(suite, Engine(baseline, with_visuals=False, rows=ROWS.value), settings, few_shots) if baseline else None
    mine, theirs = drawn_world.figures(outcome), drawn_world.figures(blind) if blind else None
    report = mine | {
        "without_pictures": theirs,
        "counts": drawn_world.counts(outcome),
        "seconds": _with_evaluation(seconds, time.monotonic() - began),
        **_about(model, baseline, settings),
    }
    other: Any = theirs or {}
    headline = [
        [figure, *(mine[split][figure] for split in drawn_world.SPLITS), *(other.get(split, {}).get(figure) for split in drawn_world.SPLITS)]
        for figure in mine["seen"]
    ]
    columns = ["seen pairs", "unseen pairs", "seen, without pictures", "unseen, without pictures"]
    types = sorted({t for split in drawn_world.SPLITS for t in mine["vqa_by_type"][split]})
    by_type = [
        [t, *(part.get("vqa_by_type", {}).get(split, {}).get(t) for part in (mine, other) for split in drawn_world.SPLITS)] for t in types
    ]
    shots = [str(n) for n in drawn_world.BINDING_SHOTS]
    binding = [[name, *(part["binding_accuracy"][n] for n in shots)] for name, part in _named(mine, theirs)]
    few = [[f"{task}, {name}", *part["few_shot"][task].values()] for name, part in _named(mine, theirs) for task in part["few_shot"]]
    accuracy = {name: ([int(n) for n in shots], list(part["binding_accuracy"].values())) for name, part in _named(mine, theirs)}
    write_report(
        pathlib.Path(OUTPUT.value), report, title="Flamingo on the drawn world",
        tables=[
            Table("New pictures, zero-shot", ["", *columns], headline),
            Table("A word bound in the prompt, 2-way, by shots", ["", *shots], binding),
            Table("Few-shot, by shots", ["", *map(str, few_shots)], few),
            Table("Questions by type", ["", *columns], by_type),
            Table("Wall time", ["stage", "seconds"], [[name, f"{value:.0f}"] for name, value in report["seconds"].items()]),
        ],
        results=[(f"{split} pairs: {figure}", result) for (split, figure), result in outcome.headline.items()]
        + [(f"new words, {n} shots", outcome.binding[n]) for n in (4,)],
        training=curves, lines={"new words: accuracy by shots": accuracy},
    )


def _shots(default: list[int]) -> list[int]:
    if SHOTS.value is None:
        return default
    try:
        shots = [int(text) for text in SHOTS.value]
    except ValueError as error:
        raise UserError(f"--shots={','.join(SHOTS.value)} must be numbers with commas between them, as in 0,4,8") from error
    if not shots or min(shots) < 0:
        raise UserError(f"--shots={','.join(SHOTS.value)} must be numbers from 0 up")
    return shots


def run_benchmarks(settings: Settings, seconds: dict[str, float], curves: dict[str, Any], began: float) -> None:
    """Every --benchmark at every number of --shots."""
    shots, config = _shots([0]), _config()
    benchmarks = [make_benchmark(text, config, max(shots)) for text in BENCHMARK.value]
    for place, benchmark in enumerate(benchmarks):
        if benchmark.name in (other.name for other in benchmarks[:place]):
            raise UserError(f"two benchmarks are named {benchmark.name!r}, under which the report has one: give each --benchmark its own NAME")
        for n in shots:
            benchmark.check(dataclasses.replace(settings, shots=n))
    model, baseline = _load()
    engines = {"model": Engine(model, rows=ROWS.value)}
    if baseline:
        engines["without_pictures"] = Engine(baseline, with_visuals=False, rows=ROWS.value)
    results: dict[str, list[Result]] = {
        name: [b.run(engine, dataclasses.replace(settings, shots=n)) for b in benchmarks for n in shots] for name, engine in engines.items()
    }
    figures = {name: {b.name: {str(r.shots): r.figures for r in some if r.name == b.name} for b in benchmarks} for name, some in results.items()}
    report = {
        "benchmarks": figures["model"],
        "without_pictures": figures.get("without_pictures"),
        "counts": {b.name: {str(r.shots): len(r.samples) for r in results["model"] if r.name == b.name} for b in benchmarks},
        "seconds": _with_evaluation(seconds, time.monotonic() - began),
        **_about(model, baseline, settings),
    }
    rows = [[f"{r.name}, {who}", *([r.shots, r.accuracy, len(r.samples)])] for who, some in results.items() for r in some]
    write_report(
        pathlib.Path(OUTPUT.value), report, title=f"Evaluation of {MODEL.value}",
        tables=[Table("Accuracy", ["benchmark", "shots", "accuracy", "samples"], rows)],
        results=[(f"{result.name}, {result.shots} shots", result) for result in results["model"]], training=curves,
    )


def make_benchmark(text: str, config: FlamingoConfig, shots: int) -> Benchmark:
    """The benchmark that a --benchmark describes, with its data read."""
    match = re.fullmatch(r"(\w+):([^=]+)=([^,]+?)(?:,support=([^,]+))?", text)
    if not match or match[1] not in KINDS:
        raise UserError(f"--benchmark={text} must be KIND:NAME=DATASET[:SPLIT][,support=DATASET[:SPLIT]] with KIND one of {', '.join(KINDS)}")
    sort, name, place, support_place = match.groups()
    path, split = _path_and_split(place, "test")
    if sort == "binding":
        return Binding(name, read_pages(_limited(open_records(path, split, "pages")), config))
    queries = _examples(path, split, config, limited=True)
    support: list[Example] = []
    if support_place or shots or (TEXT_EXAMPLES.value and sort != "classification"):
        support = _examples(*_path_and_split(support_place or path, "train"), config, limited=False)
    if sort == "captioning":
        return captioning(name, queries, support, form=prompts.Format(CAPTION_PROMPT.value))
    if sort == "vqa":
        return question_answering(name, queries, support)
    classes = sorted({example.answers[0] for example in [*queries, *support]})
    form = prompts.QUESTION if any(query.question for query in queries) else prompts.Format(CAPTION_PROMPT.value)
    return Classification(name, queries, support, classes, form)


SUPPORT_LIMIT = 2048
"""Records of a support set (paper: 2048)."""


def _examples(path: str, split: str, config: FlamingoConfig, *, limited: bool) -> list[Example]:
    import tensorflow_datasets as tfds

    from data_pipelines.features import dataset_folder

    kind = kind_of(tfds.builder_from_directory(str(dataset_folder(path))).info.features)
    if kind not in ("pairs", "videos", "questions"):
        raise UserError(f"the dataset {path} holds {kind}, but pairs, videos or questions are needed")
    records = open_records(path, split, kind)
    return read_examples(_limited(records) if limited else _first(records, SUPPORT_LIMIT), kind, config)


def _path_and_split(text: str, default: str) -> tuple[str, str]:
    path, _, split = text.partition(":")
    return path, split or default


def _limited(records: Sequence[Any]) -> list[Any]:
    return _first(records, LIMIT.value or len(records))


def _first(records: Sequence[Any], count: int) -> list[Any]:
    return [records[place] for place in range(min(count, len(records)))]


def _config() -> FlamingoConfig:
    """The model's. The baseline is opened as well, so that a wrong folder is said before any work."""
    if BASELINE.value:
        flamingo_config(BASELINE.value)
    return flamingo_config(MODEL.value)


def _load() -> tuple[Loaded, Loaded | None]:
    """The model and the baseline, if there is one."""
    return load_flamingo(MODEL.value), load_flamingo(BASELINE.value) if BASELINE.value else None


def _about(model: Loaded, baseline: Loaded | None, settings: Settings) -> dict[str, Any]:
    return {
        "figures_are": "fractions between 0 and 1",
        "model": {"folder": MODEL.value, "digest": model.digest},
        "baseline": {"folder": BASELINE.value, "digest": baseline.digest} if baseline else None,
        "settings": dataclasses.asdict(settings),
    }


def _named(mine: Any, theirs: Any) -> list[tuple[str, Any]]:
    return [("model", mine)] + ([("without pictures", theirs)] if theirs else [])


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
        files["without pictures"] = pathlib.Path(BASELINE.value) / "metrics.jsonl"
    return {name: read_metrics(file) for name, file in files.items()}


def _with_evaluation(seconds: dict[str, float], evaluation: float) -> dict[str, float]:
    """Wall seconds by stage, with the evaluation's own among them and in their total, if they have one."""
    total = {TOTAL: seconds[TOTAL] + evaluation} if TOTAL in seconds else {}
    return {name: value for name, value in seconds.items() if name != TOTAL} | {"evaluation": evaluation} | total


def _json_file(path: str) -> dict[str, float]:
    try:
        return json.loads(pathlib.Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"--seconds={path} cannot be read as JSON: {error}") from error


if __name__ == "__main__":
    command.run(main)
