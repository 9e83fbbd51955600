r"""Evaluates an exported Flamingo on benchmarks, and writes report.html, report.md and report.json,
or runs the evaluators of a training run.

    python -m launch.evaluate --model=EXPORT --output=FOLDER --suite=coco,vqav2 --data=benchmarks \
        --shots=0,4,32 --selection=rices

runs benchmarks in their official files, which lie in --data/NAME or --folder=NAME=FOLDER;
`--layout` prints which files those are. Suites: paper, open_flamingo, captions, vqa, video,
ranking. Beside every few-shot figure stands its control, the same shots without their images.
Results and predictions are kept in --output as they are made; the same command goes on where it
was killed.

    python -m launch.evaluate --model=EXPORT --output=FOLDER \
        --benchmark=captioning:photos=data/photos:test --shots=0,4,8

runs benchmarks on own datasets. A benchmark is KIND:NAME=DATASET[:SPLIT][,support=DATASET[:SPLIT]],
with KIND one of
  captioning      pairs or videos; CIDEr-D, BLEU, ROUGE-L, and the share that equals a caption
  vqa             questions; VQA accuracy, and that of always giving the most frequent answer of
                  the training split
  classification  pairs, videos or questions whose answers are class names, ranked by
                  log-likelihood
  binding         pages that name images with new words; which word names the last image
The default SPLIT is `test`. The classes are all answers in the evaluated split and the support
set, or the lines of --classes=FILE. A model that was trained on questions is asked questions with
the prompt of its training; all others are those of the paper, with two text-only examples first in
zero-shot. Few-shot examples come from the support set, by default the `train` split of the dataset.

    python -m launch.evaluate --suite=quickstart --data=runs/quickstart/data --model=EXPORT \
        --baseline=EXPORT --output=FOLDER

runs the quickstart's suite. The baseline is a model that was trained without images; it gets
the same prompts with all images removed.

    python -m launch.evaluate --evaluator=retrieval --workdir=runs/quickstart/contrastive
    python -m launch.evaluate --evaluator=kind=retrieval,path=data/photos --model=EXPORT

runs an evaluator on the newest checkpoint of a run or on an export, as the run does during
training. It is named (config.evaluators.NAME of the run's config) or described by its fields;
`held_out` gives the losses of config.held_out. Prints one JSON object.
"""

import dataclasses
import json
import pathlib
from typing import Any

from absl import flags

from flamingo_jax import experiment
from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.suites.description import (
    BenchmarkDescription,
    parse_numbers,
    parse_shots,
)
from flamingo_jax.paths import as_path
from launch import command, devices

MODEL = flags.DEFINE_string("model", "", "Exported folder of a model.")
WORKDIR = flags.DEFINE_string(
    "workdir", "", "evaluator: folder of a training run, in place of --model."
)
BASELINE = flags.DEFINE_string(
    "baseline", "", "Exported folder of a Flamingo trained without images."
)
OUTPUT = flags.DEFINE_string("output", "", "Folder for report.json and report.html.")
BENCHMARK = flags.DEFINE_multi_string(
    "benchmark", [], "KIND:NAME=DATASET[:SPLIT][,support=DATASET[:SPLIT]]."
)
SUITE = flags.DEFINE_list(
    "suite", [], "Benchmarks or suites of them, with commas between them; or quickstart."
)
LAYOUT = flags.DEFINE_bool(
    "layout", False, "suite: print where the official files of its benchmarks must lie, and end."
)
EVALUATOR = flags.DEFINE_multi_string(
    "evaluator", [], "Name of one of config.evaluators, held_out, or KEY=VALUE,... of its fields."
)
DATA = flags.DEFINE_string(
    "data", "", "suite: the folder that holds its datasets, each in a folder of its name."
)
FOLDER = flags.DEFINE_multi_string(
    "folder", [], "suite: NAME=FOLDER of a benchmark whose files are elsewhere."
)
SPLIT = flags.DEFINE_string("split", "", "suite: the queries' split; by default the paper's.")
SUPPORT_SPLIT = flags.DEFINE_string(
    "support_split", "", "suite: the split that shots are chosen from; by default the paper's."
)
MISSING_MEDIA = flags.DEFINE_enum(
    "missing_media",
    "error",
    ["error", "skip"],
    "suite: whether an example whose image or video is not there is an error, or left out and"
    " counted.",
)
SHOTS = flags.DEFINE_list(
    "shots",
    None,
    "Numbers of examples before the query; by default 0 for --benchmark, and for a suite those of"
    " the paper: 0, 4, 8, 16 and 32.",
)
SELECTION = flags.DEFINE_enum(
    "selection",
    "random",
    ["random", "random_per_query", "rices"],
    "How few-shot examples are chosen: one random draw for all queries, a draw for each query, or "
    "by similarity of their images to the query's.",
)
TEXT_EXAMPLES = flags.DEFINE_integer(
    "text_examples",
    None,
    "Text-only examples of zero-shot prompts; by default 2 (as in the paper), or 0 before a"
    " question to a model trained on questions.",
    lower_bound=0,
)
QUESTION_PROMPT = flags.DEFINE_string(
    "question_prompt",
    None,
    "What stands between an image and the answer, with {question} in it; by default what the"
    f" model was trained with, or '{experiment.QUESTION_PROMPT}'.",
)
CAPTION_PROMPT = flags.DEFINE_string(
    "caption_prompt",
    experiment.CAPTION_PROMPT,
    "What stands between an image and its caption or class (paper:"
    f" {experiment.CAPTION_PROMPT}); empty for models that have met captions right after their"
    " images alone, as in plain pairs.",
)
WORDNET = flags.DEFINE_string(
    "wordnet",
    "",
    "suite: folder of WordNet 3.0's files, which OK-VQA's and NExT-QA's metrics read; by default"
    " Debian's or nltk's.",
)
SEEDS = flags.DEFINE_list(
    "seeds", None, "Seeds of the shots, each a run of its own; by default --seed alone."
)
CONTROL = flags.DEFINE_bool(
    "control", True, "Run few-shot evaluations again with the images of the shots taken away."
)
PERMUTATIONS = flags.DEFINE_integer(
    "permutations",
    1,
    "Orders of the shots over which the log-likelihoods of candidates are averaged (paper: 6).",
    lower_bound=1,
)
BEAM = flags.DEFINE_integer(
    "beam_size", 3, "Hypotheses of beam search (paper: 3); 1 is greedy.", lower_bound=1
)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens",
    None,
    "Tokens of an answer at most; by default 24, or as many as the benchmark needs.",
    lower_bound=1,
)
LIMIT = flags.DEFINE_integer(
    "limit", 0, "Records of each benchmark at most, drawn by --seed; 0 for all.", lower_bound=0
)
SUPPORT_LIMIT = flags.DEFINE_integer(
    "support_limit",
    2048,
    "Records of a support set at most, drawn by --seed (paper: 2048); 0 for all.",
    lower_bound=0,
)
DEFAULT_TOKENS = 24
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
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Prompts in a batch at most.", lower_bound=1)
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the choice of queries, support set and shots.", lower_bound=0
)
MESH = flags.DEFINE_string("mesh", "", devices.HELP)
FROZEN_DTYPE = flags.DEFINE_enum("frozen_dtype", None, devices.FROZEN_DTYPES, devices.DTYPE_HELP)
PARTS = command.define_parts()
SECONDS = flags.DEFINE_string("seconds", "", "JSON file {stage: seconds} for the report.")
CURVES = flags.DEFINE_multi_string(
    "curves",
    [],
    "NAME=metrics.jsonl of a stage whose losses the report shows beside the model's own.",
)

_ASKING = (
    *("output", "shots", "selection", "text_examples", "beam_size", "max_tokens", "limit"),
    *("batch_size", "seed", "mesh", "frozen_dtype", "parts"),
)
_SHOWN = ("baseline", "seconds", "curves")
_CELLS = ("seeds", "control", "permutations", "question_prompt", "support_limit", "frames", "fps")
READS = {
    "--benchmark": ("benchmark", *_ASKING, *_CELLS, "caption_prompt", "classes"),
    "--suite": (
        *("suite", *_ASKING, *_CELLS, "data", "folder", "split", "support_split"),
        *("missing_media", "layout", "wordnet"),
    ),
    "--suite=quickstart": ("suite", *_ASKING, *_SHOWN, "data", "few_shot_limit"),
    "--evaluator": ("evaluator", "workdir", "parts"),
}
"""{mode of the command: flags that only some modes read}."""


def main() -> int:
    ways = {"--benchmark": BENCHMARK.value, "--suite": SUITE.value, "--evaluator": EVALUATOR.value}
    chosen = [way for way, value in ways.items() if value]
    if len(chosen) != 1:
        raise UserError("name one of --benchmark, --suite or --evaluator, and no other of them")
    quickstart = SUITE.value == ["quickstart"]
    way = "--suite=quickstart" if quickstart else chosen[0]
    command.reject_unused_flags(READS, way, command.given_flags())
    if EVALUATOR.value:
        return run_evaluators()
    if LAYOUT.value:
        return print_layout()
    for name, value in (("model", MODEL.value), ("output", OUTPUT.value)):
        if not value:
            raise UserError(f"--{name} is not set: see `python -m launch.evaluate --help`")
    return run_quickstart_suite() if quickstart else run_benchmarks()


def print_layout() -> int:
    """Prints the official files of the suite's benchmarks."""
    for benchmark in _named_benchmarks():
        print(f"{benchmark.title}: --data/{benchmark.name}/, splits {', '.join(benchmark.splits)}")
        for path, what in benchmark.layout.items():
            print(f"  {path:<40} {what}")
    return 0


def run_quickstart_suite() -> int:
    """Runs the quickstart's suite on the model and, if given, the baseline."""
    if not DATA.value:
        raise UserError("--data is not set: name the folder that holds the suite's datasets")
    few_shots = parse_shots(SHOTS.value, [0, 4, 8, 16, 32])
    from data_pipelines.evaluation_data import PreparedDatasets
    from flamingo_jax.evaluation.synthetic_world.report import evaluate_synthetic_world

    evaluate_synthetic_world(
        _run(),
        PreparedDatasets(DATA.value),
        few_shots=few_shots,
        limit=LIMIT.value,
        few_shot_limit=FEW_SHOT_LIMIT.value,
    )
    return _wrote()


def run_benchmarks() -> int:
    """Runs the suite, or every --benchmark, at every number of --shots."""
    shots = None if SUITE.value and SHOTS.value is None else parse_shots(SHOTS.value, [0])
    seeds = parse_numbers("seeds", SEEDS.value, [SEED.value])
    descriptions = [BenchmarkDescription.parse(text) for text in BENCHMARK.value]
    official = _named_benchmarks() if SUITE.value else []
    run = _run()
    run.config()
    if SUITE.value:
        benchmarks = _official(official)
    else:
        benchmarks = _described(descriptions, max(shots or [0]))
    from flamingo_jax.evaluation.suites.cells import SuiteOptions
    from flamingo_jax.evaluation.suites.running import evaluate_suite, summary

    settings = dataclasses.replace(
        run.settings,
        permutations=PERMUTATIONS.value,
        frames=FRAMES.value,
        fps=FPS.value,
    )
    results = evaluate_suite(
        dataclasses.replace(run, settings=settings),
        benchmarks,
        SuiteOptions(settings, shots, seeds, CONTROL.value, WORDNET.value),
    )
    if devices.is_first_process():
        command.print_table(summary(results))
    return _wrote()


def _named_benchmarks() -> Any:
    """Returns the benchmarks of --suite; imports no jax, so that a wrong name is told at once."""
    from flamingo_jax.evaluation.benchmarks.registry import find_benchmarks

    return find_benchmarks(SUITE.value)


def _official(benchmarks: Any) -> Any:
    """Opens the official files of the suite's benchmarks."""
    from flamingo_jax.evaluation.suites.evaluation_run import trained_prompts
    from flamingo_jax.evaluation.suites.reading import OpeningOptions, open_official

    folders = {}
    for text in FOLDER.value:
        name, _, folder = text.partition("=")
        if name not in {one.name for one in benchmarks} or not folder:
            raise UserError(
                f"--folder={text} must be NAME=FOLDER with a benchmark of the suite:"
                f" {', '.join(one.name for one in benchmarks)}"
            )
        folders[name] = folder
    if not DATA.value and len(folders) < len(benchmarks):
        raise UserError("--data is not set: name the folder that holds the suite's datasets")
    return open_official(
        benchmarks,
        OpeningOptions(
            root=DATA.value,
            folders=folders,
            split=SPLIT.value,
            support_split=SUPPORT_SPLIT.value,
            limit=LIMIT.value,
            support_limit=SUPPORT_LIMIT.value,
            seed=SEED.value,
            missing_media="skip" if MISSING_MEDIA.value == "skip" else "error",
            text_examples=TEXT_EXAMPLES.value,
            trained_on_questions=bool(trained_prompts(MODEL.value)),
            question_prompt=QUESTION_PROMPT.value,
            max_tokens=MAX_TOKENS.value,
            wordnet=WORDNET.value,
        ),
    )


def _described(descriptions: Any, shots: int) -> Any:
    """Opens the datasets of --benchmark."""
    from data_pipelines.evaluation_data import PreparedDatasets
    from flamingo_jax.evaluation.suites.evaluation_run import trained_prompts
    from flamingo_jax.evaluation.suites.own_datasets import BenchmarkReader
    from flamingo_jax.evaluation.suites.reading import open_described

    reader = BenchmarkReader(
        PreparedDatasets(),
        limit=LIMIT.value,
        support_limit=SUPPORT_LIMIT.value,
        fps=FPS.value,
        seed=SEED.value,
        caption_prompt=CAPTION_PROMPT.value,
        question_prompt=QUESTION_PROMPT.value,
        trained_prompts=trained_prompts(MODEL.value),
        classes_file=CLASSES.value,
    )
    return open_described(
        descriptions,
        reader,
        shots=shots,
        text_examples=TEXT_EXAMPLES.value,
        max_tokens=MAX_TOKENS.value or DEFAULT_TOKENS,
    )


def run_evaluators() -> int:
    """Runs each --evaluator on the newest checkpoint of a run, or on an export."""
    if bool(MODEL.value) == bool(WORKDIR.value):
        raise UserError("name what is measured: --workdir=FOLDER of a run, or --model=EXPORT")
    from launch.evaluators import measure

    print(
        json.dumps(
            measure(
                EVALUATOR.value,
                model=MODEL.value,
                workdir=WORKDIR.value,
                parts=command.parts(PARTS),
            )
        )
    )
    return 0


def _run() -> Any:
    """Makes an `EvaluationRun` of the flags: the model, how it is prompted, and the report."""
    from flamingo_jax.evaluation.protocol.benchmark import EvaluationSettings
    from flamingo_jax.evaluation.suites.evaluation_run import EvaluationRun, read_json
    from flamingo_jax.inference.decoding import DecodingConfig
    from flamingo_jax.json_lines import read_lines

    curves = {}
    for text in CURVES.value:
        name, _, path = text.partition("=")
        if not as_path(path).is_file():
            raise UserError(f"--curves={text} must be NAME=FILE with a metrics.jsonl that is there")
        curves[name] = read_lines(as_path(path))
    text_examples = TEXT_EXAMPLES.value
    if text_examples is None:
        text_examples = EvaluationSettings.text_examples
    mesh = devices.open_mesh(MESH.value)
    devices.keep_compiled_programs()
    return EvaluationRun(
        MODEL.value,
        pathlib.Path(OUTPUT.value),
        EvaluationSettings(
            text_examples=text_examples,
            selection=SELECTION.value,
            folder=OUTPUT.value if devices.is_only_process() else "",
            seed=SEED.value,
            decoding=DecodingConfig(
                max_tokens=MAX_TOKENS.value or DEFAULT_TOKENS, beam_size=BEAM.value
            ),
        ),
        baseline=BASELINE.value,
        batch_size=BATCH_SIZE.value,
        mesh=mesh,
        frozen_dtype=FROZEN_DTYPE.value,
        parts=command.parts(PARTS),
        seconds=read_json(pathlib.Path(SECONDS.value)) if SECONDS.value else {},
        curves=curves,
    )


def _wrote() -> int:
    if devices.is_first_process():
        print(f"wrote {OUTPUT.value}/report.json and {OUTPUT.value}/report.html")
    return 0


if __name__ == "__main__":
    command.run(main)
