r"""Evaluates an exported Flamingo and writes report.json and report.html, or runs the
evaluators of a training run. All metrics are fractions between 0 and 1.

    python -m launch.evaluate --model=EXPORT --output=FOLDER \
        --benchmark=captioning:photos=data/photos:test --shots=0,4,8

A benchmark is KIND:NAME=DATASET[:SPLIT][,support=DATASET[:SPLIT]], with KIND one of
  captioning      pairs or videos; a caption scores 1 if it equals one of the record's captions
  vqa             questions; VQA accuracy, and that of always giving the most frequent answer
  of
                  the training split
  classification  pairs, videos or questions whose answers are class names, ranked by
                  log-likelihood
  binding         pages that name images with new words; which word names the last image
The default SPLIT is `test`. The classes are all answers in the evaluated split and the support
set, or the lines of --classes=FILE. A model that was trained on questions gets the prompts of
its training; a Flamingo trained on pages and pairs gets those of the paper, with two text-only
examples first. Few-shot examples come from the support set, by default the `train` split of
the dataset.

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

import json
import pathlib
from typing import Any

from absl import flags

from flamingo_jax import experiment
from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.description import BenchmarkDescription, parse_shots
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
SUITE = flags.DEFINE_enum("suite", None, ["quickstart"], "A set of benchmarks with its own report.")
EVALUATOR = flags.DEFINE_multi_string(
    "evaluator", [], "Name of one of config.evaluators, held_out, or KEY=VALUE,... of its fields."
)
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
    ["random", "random_per_query", "rices"],
    "How few-shot examples are chosen: one random draw for all queries, a draw for each query, or "
    "by similarity of their images to the query's.",
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
BEAM = flags.DEFINE_integer(
    "beam_size", 3, "Hypotheses of beam search (paper: 3); 1 is greedy.", lower_bound=1
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
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Prompts in a batch at most.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the choice of examples.", lower_bound=0)
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
    *("baseline", "output", "shots", "selection", "text_examples", "beam_size", "max_tokens"),
    *("limit", "batch_size", "seed", "seconds", "curves", "mesh", "frozen_dtype", "parts"),
)
READS = {
    "--benchmark": (
        *("benchmark", *_ASKING, "question_prompt", "caption_prompt", "classes"),
        *("support_limit", "frames", "fps"),
    ),
    "--suite": ("suite", *_ASKING, "data", "few_shot_limit"),
    "--evaluator": ("evaluator", "workdir", "parts"),
}
"""{mode of the command: flags that only some modes read}."""


def main() -> int:
    ways = {"--benchmark": BENCHMARK.value, "--suite": SUITE.value, "--evaluator": EVALUATOR.value}
    chosen = [way for way, value in ways.items() if value]
    if len(chosen) != 1:
        raise UserError("name one of --benchmark, --suite or --evaluator, and no other of them")
    command.reject_unused_flags(READS, chosen[0], command.given_flags())
    if EVALUATOR.value:
        return run_evaluators()
    for name, value in (("model", MODEL.value), ("output", OUTPUT.value)):
        if not value:
            raise UserError(f"--{name} is not set: see `python -m launch.evaluate --help`")
    return run_suite() if SUITE.value else run_benchmarks()


def run_suite() -> int:
    """Runs the quickstart's suite on the model and, if given, the baseline."""
    if not DATA.value:
        raise UserError("--data is not set: name the folder that holds the suite's datasets")
    few_shots = parse_shots(SHOTS.value, [0, 4, 8, 16, 32])
    from data_pipelines.evaluation_data import PreparedDatasets
    from flamingo_jax.evaluation.synthetic_world_report import evaluate_synthetic_world

    evaluate_synthetic_world(
        _run(),
        PreparedDatasets(DATA.value),
        few_shots=few_shots,
        limit=LIMIT.value,
        few_shot_limit=FEW_SHOT_LIMIT.value,
    )
    return _wrote()


def run_benchmarks() -> int:
    """Runs every --benchmark at every number of --shots."""
    descriptions = [BenchmarkDescription.parse(text) for text in BENCHMARK.value]
    shots = parse_shots(SHOTS.value, [0])
    from data_pipelines.evaluation_data import PreparedDatasets
    from flamingo_jax.evaluation.benchmark_reader import BenchmarkReader
    from flamingo_jax.evaluation.runner import evaluate_benchmarks, trained_prompts

    run = _run()
    run.config()
    drawn: dict[str, Any] = {
        "limit": LIMIT.value,
        "support_limit": SUPPORT_LIMIT.value,
    }
    reader = BenchmarkReader(
        PreparedDatasets(),
        fps=FPS.value,
        seed=SEED.value,
        caption_prompt=CAPTION_PROMPT.value,
        question_prompt=QUESTION_PROMPT.value,
        trained_prompts=trained_prompts(MODEL.value),
        classes_file=CLASSES.value,
        **drawn,
    )
    benchmarks = [
        reader.read(description, max(shots), run.settings.text_examples)
        for description in descriptions
    ]
    table = evaluate_benchmarks(run, benchmarks, shots, drawn)
    if devices.is_first_process():
        command.print_table(table)
    return _wrote()


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
    from flamingo_jax.evaluation.runner import EvaluationRun, read_json, trained_prompts
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
        text_examples = 0 if trained_prompts(MODEL.value) else EvaluationSettings.text_examples
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
            frames=FRAMES.value,
            fps=FPS.value,
            decoding=DecodingConfig(max_tokens=MAX_TOKENS.value, beam_size=BEAM.value),
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
