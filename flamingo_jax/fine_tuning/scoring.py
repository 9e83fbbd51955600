"""Scores a fine-tuned model on a split by the task's metric. All that fine-tuning needs of the
evaluation room is called here.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.datasets import DatasetReader
from flamingo_jax.evaluation.metrics.average_precision import roc_auc
from flamingo_jax.evaluation.metrics.exact_match import exact_match
from flamingo_jax.evaluation.protocol.benchmark import EvaluationSettings, Prediction
from flamingo_jax.evaluation.protocol.classification import Classification
from flamingo_jax.evaluation.scoring.predictions import score_predictions
from flamingo_jax.evaluation.statistics import Estimate, bootstrap_estimate
from flamingo_jax.evaluation.suites.description import BenchmarkDescription
from flamingo_jax.evaluation.suites.own_datasets import BenchmarkReader
from flamingo_jax.experiment import Experiment
from flamingo_jax.fine_tuning.checks import task_dataset
from flamingo_jax.inference.decoding import DecodingConfig
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.loading import load_flamingo

BENCHMARKS = {
    "vqa_accuracy": ("vqa", "vqa"),
    "exact_match": ("vqa", "exact"),
    "cider": ("captioning", "captions"),
    "accuracy": ("classification", "top_k"),
    "roc_auc": ("classification", ""),
}
"""{metric: (the kind of benchmark that it is computed from, the scorer of its predictions)}."""


class SplitScore(NamedTuple):
    """A model's score on a split.

    score, low, high: the metric with its 95 % interval, from 0 to 1, CIDEr-D from 0 to 10; the
      interval is NaN for a single record.
    records: how many were scored.
    """

    score: float
    low: float
    high: float
    records: int


def score_split(
    model: pathlib.Path,
    experiment: Experiment,
    split: str,
    limit: int,
    datasets: DatasetReader,
    mesh: Mesh | None = None,
) -> SplitScore:
    """Scores an exported model on a split by `config.fine_tuning`, zero-shot and without
    text-only examples, as in its training.

    Args:
      model: an export of a cell.
      experiment: the cell's.
      limit: records at most, drawn by config.seed; 0 for all.
      mesh: the devices; None for the default device.

    Raises: UserError for records that cannot be read, or of one class only where the metric
      compares two.
    """
    scoring = experiment.fine_tuning
    _, dataset = task_dataset(experiment)
    reader = BenchmarkReader(
        datasets,
        limit=limit,
        seed=experiment.seed,
        caption_prompt=scoring.caption_prompt,
        question_prompt=dataset.prompt,
    )
    (kind, scorer), path = BENCHMARKS[scoring.metric], dataset.path
    # No support: its split "" has no majority answer to be counted.
    description = BenchmarkDescription(kind, split, path, split, path, "", names_support=False)
    benchmark: Any = reader.read(description, 0, 0)
    if isinstance(benchmark, Classification) and scoring.classes:
        benchmark = dataclasses.replace(benchmark, classes=scoring.classes)
    engine = Engine(load_flamingo(model, mesh=mesh), batch_size=scoring.batch_size)
    settings = EvaluationSettings(
        shots=0,
        text_examples=0,
        seed=experiment.seed,
        frames=dataset.frames,
        decoding=DecodingConfig(max_tokens=scoring.max_tokens, beam_size=scoring.beam_size),
    )
    predictions = benchmark.run(engine, settings).predictions
    if scorer:
        estimate = next(iter(score_predictions(scorer, predictions).metrics.values()))
    else:
        estimate = _roc_auc(scoring.classes, predictions, split)
    return SplitScore(estimate.score, estimate.low, estimate.high, len(predictions))


def _roc_auc(classes: Sequence[str], predictions: Sequence[Prediction], split: str) -> Estimate:
    """Computes the area under the ROC curve of the log-odds of the second class, which have the
    order of its probability.
    """
    labels = np.array([exact_match(classes[1], one.answers) > 0 for one in predictions])
    if labels.all() or not labels.any():
        raise UserError(
            f"all records of the split {split!r} are {'' if labels[0] else 'not '}{classes[1]!r},"
            " but roc_auc compares two classes: name another split or metric"
        )
    likelihoods = [dict(one.ranking) for one in predictions]
    odds = np.array([found[1] - found[0] for found in likelihoods])
    return bootstrap_estimate(
        lambda counts: roc_auc(labels, odds, counts),
        len(labels),
        [one.cluster for one in predictions],
    )
