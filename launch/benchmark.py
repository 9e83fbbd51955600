"""How fast training is on the devices that are here.

    python -m launch.benchmark train --config=configs/flamingo_3b.py:h200_1 [--steps=10]
    [--json] [--trace=FOLDER] python -m launch.benchmark train
    --sizes=layers=4,width=256,heads=4,vocab=8192,xattn_every=1,vit_layers=4,vit_width=256,vit_heads=4,\\
image=96,patch=16,interleaved=8x3x128,pairs=16x1x32
    python -m launch.benchmark data --config=configs/own_data.py:flamingo,runs/mine
    [--step_seconds=0.2] python -m launch.benchmark data --dataset=data/photos
    --dataset=data/site --tokenizer=data/tokenizer [--image_size=224] [--readers=2]

`train` runs the real update on random weights and full rows of random content, and prints
tokens and images a second, the time of each part and the model FLOPs utilisation, measured
against a large matrix product on the same devices in the same run. `--sizes` makes a Flamingo
that
a PyTorch peer can be built with as well: a language model of the GPT-NeoX form (rotary
positions, GELU, a head of its own), a ViT, a resampler of 6 layers, cross-attention of 8 heads
of 64; `interleaved` and `pairs` are rows x images x tokens.

`data` makes rows of each dataset on one core, nothing kept but what is made of texts, and
prints their images a second beside those of a loop that only decodes and resizes the same
images, and the part of the rows' tokens that is no padding. Then it makes them by the clock
with one reader and with `--readers` (config.training.readers, or as many as there are cores):
images are flipped and their colour jitter drawn, as in the paper. At last it reads all datasets
together as training does, with images kept while memory allows, and prints which part of the
time a step of `--step_seconds` would wait.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import tensorflow_datasets as tfds
from absl import flags
from rich.console import Console
from rich.table import Table

from configs.base import COLOUR
from configs.benchmark import experiment_of
from data_pipelines.batches import make_iterator
from data_pipelines.features import dataset_folder, kind_of
from data_pipelines.iterators import make_iterators
from data_pipelines.readers import Readers
from data_pipelines.records import IMAGE_FEATURES
from data_pipelines.timing import ReadingSpeed, time_readers, time_reading, waiting_share
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import DatasetConfig, Experiment
from flamingo_jax.planning.timing import Timing, time_step
from flamingo_jax.processing.tokenizer import Tokenizer
from launch import command

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


ROWS = {
    "pages": DatasetConfig(kind="pages", batch_size=64, max_length=256, visuals=5),
    "pairs": DatasetConfig(kind="pairs", batch_size=8, max_length=256, visuals=16),
    "videos": DatasetConfig(kind="videos", batch_size=8, max_length=64, visuals=4, frames=8),
    "questions": DatasetConfig(kind="questions", batch_size=8, max_length=256, visuals=16),
}
"""What rows are made of a dataset that no config describes. Pages as in the paper (A.3.1),
short texts packed as full as they come; of pages more rows to a batch, since most stretches of
256 tokens have no image in them.
"""


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
"""For each way to use the command the flags that not all of them read."""


def main(verb: str) -> int:
    way = verb if verb == "train" else "data --dataset" if DATASETS.value else "data --config"
    command.refuse_unread(READS, way, command.given_flags())
    if verb == "data":
        return data()
    if SIZES.value and CONFIG.value is not None:
        raise UserError("--sizes and --config both describe a model: give one of them")
    experiment = experiment_of(SIZES.value) if SIZES.value else command.experiment(CONFIG)
    if experiment.task == "contrastive":
        raise UserError(
            "this config trains the contrastive stage, which the benchmark has no batches for:"
            " choose a Flamingo's or a language model's"
        )
    experiment = dataclasses.replace(
        experiment, vision_encoder_from="random", language_model_from="random", flamingo_from=""
    )
    timing = time_step(experiment, steps=STEPS.value, trace=TRACE.value)
    if JSON.value:
        print(json.dumps(timing._asdict() | {"mfu": timing.mfu}))
    else:
        Console().print(_table(experiment, timing))
    return 0


def data() -> int:
    """Raises UserError where a dataset is missing or has no images."""
    if bool(DATASETS.value) == (CONFIG.value is not None):
        raise UserError(
            "data to read: name a config with --config, or folders with --dataset and --tokenizer"
        )
    if DATASETS.value:
        experiment, tokenizer, size = None, _tokenizer(), IMAGE_SIZE.value
        mean: tuple[float, ...] = (0.5, 0.5, 0.5)
        datasets = {pathlib.Path(path).name: _dataset(path) for path in DATASETS.value}
    else:
        experiment = command.experiment(CONFIG)
        vision = (experiment.contrastive or experiment.flamingo).vision  # type: ignore[union-attr]
        tokenizer, size, mean = (
            Tokenizer.load(pathlib.Path(experiment.tokenizer)),
            vision.image_size,
            vision.mean,
        )
        datasets = {
            name: dataset
            for name, dataset in experiment.data.items()
            if dataset.kind in IMAGE_FEATURES
        }
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "task": experiment.task if experiment else "flamingo",
        "image_size": size,
        "mean": mean,
    }
    asked = (
        READERS.value
        if READERS.value is not None
        else experiment.training.readers
        if experiment
        else 0
    )
    readers = Readers(asked)
    readings, paces = {}, {}
    for name, dataset in datasets.items():
        make = functools.partial(make_iterator, dataset, cache_bytes=0, **options)
        readings[name] = time_reading(make(), size, BATCHES.value)
        paces[name] = time_readers(
            lambda readers, make=make: make(readers=readers),  # type: ignore[misc]
            sorted({1, readers.count}),
            BATCHES.value,
        )
    if experiment:
        iterators = make_iterators(experiment, tokenizer, readers=readers)
    else:
        iterators = {
            name: make_iterator(dataset, readers=readers, **options)
            for name, dataset in datasets.items()
        }
    share = waiting_share(iterators, STEP_SECONDS.value, BATCHES.value)
    for it in iterators.values():
        it.close()
    if JSON.value:
        found = {
            name: made._asdict() | {"share": made.share, "readers": paces[name]}
            for name, made in readings.items()
        }
        print(json.dumps({"datasets": found, "waiting": share}))
    else:
        Console().print(_reading_table(readings, paces, share))
    return 0


def _tokenizer() -> Tokenizer:
    if not TOKENIZER.value:
        raise UserError(
            "--dataset wants --tokenizer: the folder of the tokenizer that the rows shall be"
            " made with"
        )
    return Tokenizer.load(pathlib.Path(TOKENIZER.value))


def _dataset(path: str) -> DatasetConfig:
    kind = kind_of(tfds.builder_from_directory(str(dataset_folder(path))).info.features)
    if kind not in ROWS:
        raise UserError(
            f"the dataset {path} holds {kind}, which has no images to read: take it out"
        )
    return dataclasses.replace(ROWS[kind], path=path, flip=True, colour=COLOUR)


def _reading_table(
    readings: dict[str, ReadingSpeed], paces: dict[str, dict[int, float]], share: float
) -> Table:
    table = Table(
        "dataset",
        title=f"reading; a step of {STEP_SECONDS.value:g} s waits {share:.2%} of the time",
    )
    counts = [
        f"by the clock, {count} reader{'s' * (count > 1)}"
        for count in next(iter(paces.values()), {})
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
    for name, made in readings.items():
        clock = [f"{pace:,.0f}" for pace in paces[name].values()]
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


def _table(experiment: Experiment, timing: Timing) -> Table:
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
