r"""Measures how fast training runs on this machine's devices, and how fast datasets are read.

    python -m launch.benchmark train --config=configs/flamingo_3b.py:h200_1 [--steps=10]
    [--json] \
        [--trace=FOLDER]
    python -m launch.benchmark train
    --sizes=layers=4,width=256,heads=4,vocab=8192,xattn_every=1,\
    vit_layers=4,vit_width=256,vit_heads=4,image=96,patch=16,interleaved=8x3x128,pairs=16x1x32
    python -m launch.benchmark data --config=configs/own_data.py:flamingo,runs/mine \
        [--step_seconds=0.2]
    python -m launch.benchmark data --dataset=data/photos --dataset=data/site \
        --tokenizer=data/tokenizer [--image_size=224] [--readers=2]

`train` runs the real update on random weights and full rows of random content, and prints
tokens and images per second, the time of each part and the model FLOPs utilisation, relative
to a large matrix product on the same devices in the same run. `--sizes` describes a Flamingo
that can also be built in PyTorch for comparison: a language model of the GPT-NeoX architecture
(rotary positions, GELU, untied head), a ViT, a resampler of 6 layers, cross-attention with 8
heads of width 64; `interleaved` and `pairs` are rows x images x tokens.

`data` first makes rows of each dataset on one core, with a cache for tokenized texts only, and
prints images per second beside those of a loop that only decodes and resizes the same images,
and the share of tokens that are not padding. Then it measures one reader and `--readers` of
them (config.training.readers, or one per core) in wall time, with flips and colour jitter as
in the paper. Finally it reads all datasets together as training does, with decoded images
cached while memory allows, and prints the share of time that a step of `--step_seconds` would
wait.
"""

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Any

from absl import flags
from rich.table import Table

from configs.base import COLOUR
from configs.benchmark import experiment_of
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from launch import command

if TYPE_CHECKING:
    from data_pipelines.benchmark import ReadingBenchmark
    from flamingo_jax.planning.timing import Timing

SIZES = flags.DEFINE_string(
    "sizes",
    "",
    "Sizes of a model and its batches in place of a config, NAME=VALUE separated by commas.",
)
STEPS = flags.DEFINE_integer("steps", 10, "Steps that are timed.", lower_bound=1)
TRACE = flags.DEFINE_string(
    "trace", "", "Folder for a profiler trace of three steps, for TensorBoard or Perfetto."
)
DATASETS = flags.DEFINE_multi_string(
    "dataset", [], "data: folder of a dataset that was built, in place of a config's."
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
    "batches", 20, "data: batches of each dataset that are timed.", lower_bound=1
)
JSON = flags.DEFINE_bool("json", False, "Print JSON rather than a table.")
CONFIG = command.define_config()


READS = {
    "train": ("sizes", "steps", "trace"),
    "data --dataset": (
        "dataset",
        "tokenizer",
        "image_size",
        "step_seconds",
        "batches",
        "readers",
    ),
    "data --config": ("step_seconds", "batches", "readers"),
}
"""{mode of the command: flags that only some modes read}."""


def main(verb: str) -> int:
    way = verb if verb == "train" else "data --dataset" if DATASETS.value else "data --config"
    command.reject_unused_flags(READS, way, command.given_flags())
    return train() if verb == "train" else data()


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
        Console().print(_step_table(experiment, timing))
    return 0


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
        Console().print(_reading_table(measured))
    return 0


def _reading_table(
    measured: "ReadingBenchmark",
) -> Table:
    table = Table(
        "dataset",
        title=f"reading; a step of {STEP_SECONDS.value:g} s waits"
        f" {measured.waiting:.2%} of the time",
    )
    counts = [
        f"by the clock, {count} reader{'s' * (count > 1)}"
        for count in next(iter(measured.rates.values()), {})
    ]
    for heading in (
        "images a second, rows",
        "bare loop",
        "rows / bare",
        *counts,
        "tokens that are no padding",
        "images met",
    ):
        table.add_column(heading, justify="right")
    for name, made in measured.readings.items():
        clock = [f"{rate:,.0f}" for rate in measured.rates[name].values()]
        table.add_row(
            name,
            f"{made.rows:,.0f}",
            f"{made.bare:,.0f}",
            f"{made.share:.1%}",
            *clock,
            f"{made.fill:.1%}",
            f"{made.images:,}",
        )
    return table


def _step_table(experiment: Experiment, timing: "Timing") -> Table:
    table = Table("", title=f"{experiment.name or experiment.task}: one training step")
    table.add_column("", justify="right")
    table.add_row("whole step", f"{timing.step:.4g} s")
    for part, seconds in timing.parts.items():
        table.add_row(f"  {part}", f"{seconds:.4g} s")
    table.add_section()
    table.add_row("tokens a second", f"{timing.tokens / timing.step:,.0f}")
    if timing.frames:
        table.add_row("images a second", f"{timing.frames / timing.step:,.1f}")
    table.add_row("model FLOPs of a step", f"{timing.flops:.4g}")
    table.add_row("measured matrix rate", f"{timing.matrix_rate / 1e9:,.0f} GFLOP/s")
    table.add_row("model FLOPs utilisation of it", f"{timing.mfu:.1%}")
    table.add_row("compiled in", f"{timing.compile_seconds:.0f} s")
    return table


if __name__ == "__main__":
    command.run(main, verbs=("train", "data"))
