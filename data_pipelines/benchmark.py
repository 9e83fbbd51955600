"""Benchmarks reading datasets, each alone and all together (`launch.benchmark data`)."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from data_pipelines.batches import make_iterator
from data_pipelines.features import dataset_folder, kind_of
from data_pipelines.iterators import make_iterators
from data_pipelines.readers import Readers
from data_pipelines.records import IMAGE_FEATURES
from data_pipelines.timing import ReadingSpeed, time_readers, time_reading, waiting_share
from flamingo_jax.checkpointing.export import open_export
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import DatasetConfig, Experiment
from flamingo_jax.inference.loading import flamingo_config
from flamingo_jax.processing.tokenizer import Tokenizer

ROWS = {
    "pages": DatasetConfig(kind="pages", batch_size=64, max_length=256, visuals=5),
    "pairs": DatasetConfig(kind="pairs", batch_size=8, max_length=256, visuals=16),
    "videos": DatasetConfig(kind="videos", batch_size=8, max_length=64, visuals=4, frames=8),
    "questions": DatasetConfig(kind="questions", batch_size=8, max_length=256, visuals=16),
}
"""Kind -> the rows made of a dataset that is given by its path alone. Pages have windows as in
the paper (A.3.1), and more rows per batch since most windows of 256 tokens have no image;
short texts are packed.
"""


class ReadingBenchmark(NamedTuple):
    """The results of a benchmark.

    readings: {dataset: its speed on one core}.
    rates: {dataset: {reader threads: images per second of wall time}}.
    waiting: the fraction of its time that a training loop would wait for all datasets.
    """

    readings: dict[str, ReadingSpeed]
    rates: dict[str, dict[int, float]]
    waiting: float


def benchmark_datasets(
    paths: Sequence[str],
    tokenizer: pathlib.Path,
    image_size: int,
    *,
    colour: float,
    readers: int,
    step_seconds: float,
    batches: int,
) -> ReadingBenchmark:
    """Benchmarks datasets by path, with the rows of `ROWS`, flips and colour jitter.

    Args:
      paths: the datasets' folders.
      tokenizer: path of the tokenizer.
      colour: strength of the colour jitter.
      readers: number of reader threads; 0 for one per core.
      step_seconds: how long a training step takes, for `waiting`.
      batches: batches per pass.

    Raises: UserError where a dataset is missing or has no images.
    """
    options: dict[str, Any] = {
        "tokenizer": Tokenizer.load(tokenizer),
        "task": "flamingo",
        "image_size": image_size,
        "mean": (0.5, 0.5, 0.5),
    }
    datasets = {pathlib.Path(path).name: _dataset(path, colour) for path in paths}
    pool = Readers(readers)
    iterators = {
        name: make_iterator(dataset, readers=pool, **options) for name, dataset in datasets.items()
    }
    return _benchmark(datasets, iterators, options, pool, step_seconds, batches)


def benchmark_experiment(
    experiment: Experiment, *, readers: int | None, step_seconds: float, batches: int
) -> ReadingBenchmark:
    """Benchmarks the datasets of a config that have images, as its training reads them.

    readers: number of reader threads; None for the config's.
    """
    vision = (experiment.contrastive or experiment.flamingo).vision  # type: ignore[union-attr]
    tokenizer = Tokenizer.load(pathlib.Path(experiment.tokenizer))
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "task": experiment.task,
        "image_size": vision.image_size,
        "mean": vision.mean,
    }
    datasets = {
        name: dataset for name, dataset in experiment.data.items() if dataset.kind in IMAGE_FEATURES
    }
    pool = Readers(experiment.training.readers if readers is None else readers)
    iterators = make_iterators(experiment, tokenizer, readers=pool)
    return _benchmark(datasets, iterators, options, pool, step_seconds, batches)


def flamingo_batches(
    model: str, paths: Sequence[str], batches: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of datasets as an exported Flamingo was trained on: each dataset's first.

    Args:
      model: the export.
      paths: the datasets' folders; of each `batches` are read, with the rows of `ROWS`, without
        augmentation.

    Raises: UserError where the model is no Flamingo, or a dataset is missing or has no images.
    """
    export = open_export(model)
    config = flamingo_config(model)
    if export.tokenizer_file is None:
        raise UserError(f"{model} holds no tokenizer: export the stage again with its tokenizer")
    tokenizer = Tokenizer.load(export.tokenizer_file, config.language_model.vocab_size)
    for path in paths:
        dataset = dataclasses.replace(_dataset(path, 0.0), flip=False)
        iterator = make_iterator(
            dataclasses.replace(dataset, batch_size=min(dataset.batch_size, 8)),
            tokenizer=tokenizer,
            task="flamingo",
            image_size=config.vision.image_size,
            mean=config.vision.mean,
            image_fit=config.vision.image_fit,
        )
        for _ in range(batches):
            yield next(iterator)
        iterator.close()


def _benchmark(
    datasets: dict[str, DatasetConfig],
    iterators: dict[str, Any],
    options: dict[str, Any],
    pool: Readers,
    step_seconds: float,
    batches: int,
) -> ReadingBenchmark:
    """Measures each dataset alone, then all `iterators` together."""
    readings, rates = {}, {}
    for name, dataset in datasets.items():
        make = functools.partial(make_iterator, dataset, cache_bytes=0, **options)
        readings[name] = time_reading(make(), options["image_size"], batches)

        def with_readers(readers: Readers, make: Any = make) -> Any:
            return make(readers=readers)

        rates[name] = time_readers(with_readers, sorted({1, pool.count}), batches)
    waiting = waiting_share(iterators, step_seconds, batches)
    for iterator in iterators.values():
        iterator.close()
    return ReadingBenchmark(readings, rates, waiting)


def _dataset(path: str, colour: float) -> DatasetConfig:
    """Makes the config of a dataset given by its path; raises UserError for text."""
    kind = kind_of(tfds.builder_from_directory(str(dataset_folder(path))).info.features)
    if kind not in ROWS:
        raise UserError(
            f"the dataset {path} holds {kind}, which has no images to read: take it out"
        )
    return dataclasses.replace(ROWS[kind], path=path, flip=True, colour=colour)
