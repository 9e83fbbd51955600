r"""Measures how fast this machine's devices train and generate, how fast datasets are read, and
how fast and in how little memory a run is exported, what int8 weights save and change, and how fast
the most similar of many images are found; checks a machine with one GPU or a TPU host.

    python -m launch.benchmark train --config=configs/flamingo_3b.py:h200_1 [--steps=10]
    [--json] \
        [--trace=FOLDER]
    python -m launch.benchmark train
    --sizes=layers=4,width=256,heads=4,vocab=8192,xattn_every=1,\
    vit_layers=4,vit_width=256,vit_heads=4,image=96,patch=16,interleaved=8x3x128,pairs=16x1x32
    python -m launch.benchmark generate [--model=EXPORT | --config=... | --sizes=...] [--json]
    python -m launch.benchmark data --config=configs/own_data.py:flamingo,runs/mine \
        [--step_seconds=0.2]
    python -m launch.benchmark data --dataset=data/photos --dataset=data/site \
        --tokenizer=data/tokenizer [--image_size=224] [--readers=2]
    python -m launch.benchmark int8 --model=models/SmolLM2-135M --text=book.txt [--tokens=20000]
    python -m launch.benchmark int8 --model=runs/mine/export --dataset=data/photos
    python -m launch.benchmark export --folder=runs/made [--gigabytes=8]
    python -m launch.benchmark rices --rows=1000000 --queries=1000 --width=1024 [--processes=1]
    python -m launch.benchmark device --minutes=8 --output=runs/device [--size=tiny]

`train` runs the real update on random weights and full rows of random content, and prints
tokens and images per second, the time of each part and the model FLOPs utilisation, relative
to a large matrix product on the same devices in the same run. `--sizes` describes a Flamingo
that can also be built in PyTorch for comparison: a language model of the GPT-NeoX architecture
(rotary positions, GELU, untied head), a ViT, a resampler of 6 layers, cross-attention with 8
heads of width 64; `interleaved` and `pairs` are rows x images x tokens.

`generate` runs an exported model, or one of random weights, on prompts of 4 shots with random
images: captioning by beam search, beside a plain loop that runs the whole model for each token;
ranking `--names` class names, beside one call for each of `--sample` of them; and prefill and
greedy decoding with 1 and 64 prompts at a time. Without a model it takes sizes that run in a few
minutes on two cores.

`data` first makes rows of each dataset on one core, with a cache for tokenized texts only, and
prints images per second beside those of a loop that only decodes and resizes the same images,
and the share of tokens that are not padding. Then it measures one reader and `--readers` of
them (config.training.readers, or one per core) in wall time, with flips and colour jitter as
in the paper. Finally it reads all datasets together as training does, with decoded images
cached while memory allows, and prints the share of time that a step of `--step_seconds` would
wait.

`int8` loads a model as it is stored and with `frozen_dtype="int8"`, and prints the memory of its
language model and vision encoder, and how the predictions of the next token change: perplexity,
KL divergence and the largest difference of a logit. On `--text`, files or folders of .txt, it
compares the language model (of a published folder or any export that has one); on `--dataset`,
folders of datasets that were built, the whole Flamingo of an export, with their images.

`export` makes a run of about `--gigabytes` in a new folder, most of it frozen, and exports
it: in one go, and killed after half of its files and continued. It prints the rate beside that of
a bare copy of the same bytes, and how much the process grew. The folder takes about four times
that size while it runs, and is removed.

`rices` makes embeddings in the place of an encoder, stores them on disk and searches them for the
32 most similar to each query, as RICES does for shots, in processes of their own. It prints
seconds, bytes a second and the peak of memory, and for how many of the first `--sample` queries
the choice is that of sorting all similarities in float64; if not for all of them, the exit code is
1. `--folder` is by default a temporary one.

`device` is one command for a bare machine, which needs jax, flax, optax, numpy, pillow and
safetensors alone (and this repository as the working folder): fast attention against float32,
Flamingo-3B's step on decoded photos with several numbers of microbatches, generation, a run that is
stopped and resumed to the bit, and the decoding of images. Each section has a process of its own
and a share of `--minutes`; results are in `--output` as they come, in device.json and a file for
each section. A section that fails is told, the rest goes on, and the exit code is 1.
"""

import dataclasses
import json
import pathlib
import re
import tempfile
from typing import Any

from absl import flags

from configs.base import COLOUR
from configs.benchmark import experiment_of, sized
from flamingo_jax.errors import UserError
from launch import command, device_check
from launch.benchmark_tables import (
    export_table,
    generation_json,
    generation_table,
    reading_table,
    rices_table,
    step_table,
)

SIZES = flags.DEFINE_string(
    "sizes",
    "",
    "Sizes of a model and its batches in place of a config, NAME=VALUE separated by commas.",
)
STEPS = flags.DEFINE_integer("steps", 10, "Steps that are timed.", lower_bound=1)
MODEL = flags.DEFINE_string(
    "model",
    "",
    "generate: exported folder of a Flamingo, in place of random weights. int8: folder of a"
    " published model, or an export.",
)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 20, "generate: tokens that are generated for a prompt.", lower_bound=1
)
PROMPTS = flags.DEFINE_list(
    "prompts", ["1", "64"], "generate: prompts at a time, numbers separated by commas."
)
NAMES = flags.DEFINE_integer("names", 1000, "generate: names that are ranked.", lower_bound=1)
SAMPLE = flags.DEFINE_integer(
    "sample",
    20,
    "generate: names that are scored one at a time. rices: queries that are searched in float64.",
    lower_bound=1,
)
TRACE = flags.DEFINE_string(
    "trace", "", "Folder for a profiler trace of three steps, for TensorBoard or Perfetto."
)
DATASETS = flags.DEFINE_multi_string(
    "dataset", [], "data, int8: folder of a dataset that was built, in place of a config's."
)
TOKENIZER = flags.DEFINE_string("tokenizer", "", "data: the tokenizer's folder, with --dataset.")
IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", 224, "data: side of the images, with --dataset.", lower_bound=1
)
STEP_SECONDS = flags.DEFINE_float(
    "step_seconds",
    0.2,
    "data: seconds of a step; the quickstart's takes 0.2 to 0.3 on two cores.",
    lower_bound=0.0,
)
READERS = flags.DEFINE_integer(
    "readers",
    None,
    "data: threads that read, in place of the config's; 0 for one a core.",
    lower_bound=0,
)
BATCHES = flags.DEFINE_integer(
    "batches", 20, "data, int8: batches of each dataset that are read.", lower_bound=1
)
TEXTS = flags.DEFINE_multi_string("text", [], "int8: text file, or folder of .txt files.")
TOKENS = flags.DEFINE_integer(
    "tokens", 20_000, "int8: tokens of all texts together at most.", lower_bound=2
)
ROW_LENGTH = flags.DEFINE_integer(
    "row_length", 256, "int8: tokens of a row of text.", lower_bound=2
)
FOLDER = flags.DEFINE_string("folder", "", "export, rices: folder that is made, and removed.")
GIGABYTES = flags.DEFINE_float(
    "gigabytes", 8.0, "export: size of the export, about.", lower_bound=0.001, upper_bound=1000.0
)
ROWS = flags.DEFINE_integer(
    "rows", 1_000_000, "rices: images that are searched.", lower_bound=1, upper_bound=10**9
)
QUERIES = flags.DEFINE_integer(
    "queries", 1000, "rices: images that similar ones are searched for.", lower_bound=1
)
WIDTH = flags.DEFINE_integer(
    "width",
    1024,
    "rices: numbers of an embedding, as many as the vision encoder is wide.",
    lower_bound=1,
    upper_bound=1 << 16,
)
PROCESSES = flags.DEFINE_integer(
    "processes", 1, "rices: processes that share the images.", lower_bound=1, upper_bound=64
)
MINUTES = flags.DEFINE_float("minutes", 8.0, "device: for all sections together.", lower_bound=0.01)
OUTPUT = flags.DEFINE_string("output", "", "device: folder for the results.")
SIZE = flags.DEFINE_enum(
    "size", "full", device_check.SIZES, "device: full for an accelerator, tiny for a CPU."
)
SECTION = flags.DEFINE_enum(
    "section",
    "",
    ["", *(section.name for section in device_check.SECTIONS)],
    "device: the only section to run, in this process, for --minutes.",
)
JSON = flags.DEFINE_bool("json", False, "Print JSON rather than a table.")
CONFIG = command.define_config()


MADE = (
    "layers=4,width=256,heads=4,vocab=8192,xattn_every=1,vit_layers=4,vit_width=256,vit_heads=4,"
    "image=96,patch=16,interleaved=1x5x128,pairs=1x1x32"
)
"""The sizes of a model that `generate` takes where none is named."""

READS = {
    "train": ("sizes", "steps", "trace"),
    "generate": ("sizes", "model", "max_tokens", "prompts", "names", "sample"),
    "export": ("folder", "gigabytes"),
    "rices": ("rows", "queries", "width", "processes", "sample", "folder"),
    "device": ("minutes", "output", "size", "section"),
    "data --dataset": (
        "dataset",
        "tokenizer",
        "image_size",
        "step_seconds",
        "batches",
        "readers",
    ),
    "data --config": ("step_seconds", "batches", "readers"),
    "int8": ("model", "text", "tokens", "row_length"),
    "int8 --dataset": ("model", "dataset", "batches"),
}
"""{mode of the command: flags that only some modes read}."""


def main(verb: str) -> int:
    way = verb
    if verb in ("data", "int8") and DATASETS.value:
        way = f"{verb} --dataset"
    elif verb == "data":
        way = "data --config"
    command.reject_unused_flags(READS, way, command.given_flags())
    return {
        "train": train,
        "generate": generate,
        "data": data,
        "int8": int8,
        "export": export,
        "rices": rices,
        "device": device,
    }[verb]()


def train() -> int:
    """Times the training step."""
    if SIZES.value and CONFIG.value is not None:
        raise UserError("--sizes and --config both describe a model: give one of them")
    experiment = experiment_of(SIZES.value) if SIZES.value else command.experiment(CONFIG)
    if experiment.task == "contrastive":
        raise UserError(
            "this config trains the contrastive stage, which the benchmark has no batches for:"
            " choose a Flamingo's or a language model's"
        )
    from rich.console import Console

    from flamingo_jax.planning.timing import time_step

    experiment = dataclasses.replace(
        experiment, vision_encoder_from="random", language_model_from="random", flamingo_from=""
    )
    timing = time_step(experiment, steps=STEPS.value, trace=TRACE.value)
    if JSON.value:
        print(json.dumps(timing._asdict() | {"mfu": timing.mfu}))
    else:
        Console().print(step_table(experiment, timing))
    return 0


def generate() -> int:
    """Times captioning, ranking, and prefill and decoding."""
    if sum(map(bool, (MODEL.value, SIZES.value, CONFIG.value is not None))) > 1:
        raise UserError("--model, --sizes and --config each name a model: give one of them")
    if not PROMPTS.value or not all(re.fullmatch("[1-9][0-9]{0,4}", n) for n in PROMPTS.value):
        raise UserError(f"--prompts={','.join(PROMPTS.value)} must be numbers such as 1,64")
    from rich.console import Console

    import flamingo_jax as fj
    from flamingo_jax.planning.generation_timing import (
        GenerationWork,
        random_model,
        time_generation,
    )

    if MODEL.value:
        model = fj.load(MODEL.value)
    else:
        given = command.experiment(CONFIG) if CONFIG.value is not None else None
        flamingo = (given or experiment_of(SIZES.value or MADE)).flamingo
        if flamingo is None:
            raise UserError("this config trains no Flamingo: choose one that does, or --sizes")
        model = random_model(flamingo)
    work = GenerationWork(
        MAX_TOKENS.value,
        NAMES.value,
        min(SAMPLE.value, NAMES.value),
        tuple(map(int, PROMPTS.value)),
    )
    timing = time_generation(model, work)
    if JSON.value:
        print(json.dumps(generation_json(timing)))
    else:
        Console().print(generation_table(timing))
    return 0


def device() -> int:
    """Checks this machine's devices."""
    if CONFIG.value is not None:
        raise UserError("device checks Flamingo-3B, whatever the config: leave --config out")
    from rich.console import Console

    from flamingo_jax.planning.device_check.tables import section_table

    def on_end(name: str, found: dict[str, Any]) -> None:
        # JSON is printed once, at the end.
        Console(stderr=JSON.value).print(section_table(name, found))

    passed = device_check.run(OUTPUT.value, MINUTES.value, SIZE.value, SECTION.value, on_end)
    if JSON.value and not SECTION.value:
        print((pathlib.Path(OUTPUT.value) / device_check.SUMMARY).read_text())
    return 0 if passed else 1


def data() -> int:
    """Times the reading of datasets."""
    if bool(DATASETS.value) == (CONFIG.value is not None):
        raise UserError(
            "data to read: name a config with --config, or folders with --dataset and --tokenizer"
        )
    if DATASETS.value and not TOKENIZER.value:
        raise UserError(
            "--dataset wants --tokenizer: the folder of the tokenizer that the rows shall be"
            " made with"
        )
    from rich.console import Console

    from data_pipelines.benchmark import benchmark_datasets, benchmark_experiment

    how: dict[str, Any] = {"step_seconds": STEP_SECONDS.value, "batches": BATCHES.value}
    measured = (
        benchmark_datasets(
            DATASETS.value,
            pathlib.Path(TOKENIZER.value),
            IMAGE_SIZE.value,
            colour=COLOUR,
            readers=READERS.value or 0,
            **how,
        )
        if DATASETS.value
        else benchmark_experiment(command.experiment(CONFIG), readers=READERS.value, **how)
    )
    if JSON.value:
        datasets = {
            name: reading._asdict() | {"share": reading.share, "readers": measured.rates[name]}
            for name, reading in measured.readings.items()
        }
        print(json.dumps({"datasets": datasets, "waiting": measured.waiting}))
    else:
        Console().print(reading_table(measured, STEP_SECONDS.value))
    return 0


def int8() -> int:
    """Measures what int8 frozen weights save and change."""
    if not MODEL.value:
        raise UserError("--model is not set: name a published model's folder or an export")
    from rich.console import Console

    from flamingo_jax.inference.int8_change import flamingo_change, language_model_change
    from flamingo_jax.planning.tables import int8_tables

    if DATASETS.value:
        from data_pipelines.benchmark import flamingo_batches

        batches = flamingo_batches(MODEL.value, DATASETS.value, BATCHES.value)
        found = flamingo_change(MODEL.value, batches)
    else:
        texts = [text for path in TEXTS.value for text in _texts(pathlib.Path(path))]
        found = language_model_change(
            MODEL.value, texts, length=ROW_LENGTH.value, most_tokens=TOKENS.value
        )
    if JSON.value:
        memory = {part: m._asdict() | {"ratio": m.ratio} for part, m in found.memory.items()}
        change = found.change and found.change._asdict() | {"rise": found.change.rise}
        print(json.dumps({"memory": memory, "change": change}))
        return 0
    for table in int8_tables(f"{MODEL.value} in int8", found):
        Console().print(table)
    return 0


def _texts(path: pathlib.Path) -> list[str]:
    """Reads a text file, or the .txt files of a folder."""
    from data_pipelines.build.text_files import decode

    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"--text={path} holds no .txt file: name a text file, or such a folder")
    try:
        found = [decode(file.read_bytes()) for file in files]
        for text in found:
            text.encode()
    except (OSError, UnicodeError) as error:
        raise UserError(f"--text={path} cannot be read as text: {error}") from error
    return found


def export() -> int:
    """Times the export of a run that is made for it."""
    if not FOLDER.value:
        raise UserError("--folder is not set: name a folder that is made, and removed again")
    from rich.console import Console

    from flamingo_jax.planning.export_timing import time_export

    timing = time_export(sized(GIGABYTES.value), pathlib.Path(FOLDER.value))
    if JSON.value:
        print(json.dumps(timing._asdict() | {"share": timing.share}))
        return 0
    Console().print(export_table(timing))
    return 0


def rices() -> int:
    """Times the search for the most similar images."""
    from rich.console import Console

    from flamingo_jax.planning.rices_timing import RicesWork, time_rices

    work = RicesWork(
        ROWS.value,
        QUERIES.value,
        WIDTH.value,
        sample=min(SAMPLE.value, QUERIES.value),
        processes=PROCESSES.value,
    )
    with tempfile.TemporaryDirectory() as folder:
        timing = time_rices(work, pathlib.Path(FOLDER.value or f"{folder}/rices"))
    if JSON.value:
        rates = {"fill_rate": timing.fill_rate, "search_rate": timing.search_rate}
        print(json.dumps(work._asdict() | timing._asdict() | rates))
    else:
        Console().print(rices_table(work, timing))
    return 0 if timing.equal == timing.compared else 1


if __name__ == "__main__":
    command.run(main, verbs=("train", "generate", "data", "int8", "export", "rices", "device"))
