"""Makes the inputs of an experiment: an endless iterator for each training dataset, fixed
batches for each held-out one. Start here to see what a process reads.
"""

from collections.abc import Mapping
from typing import Any

import jax

from data_pipelines.batches import BatchIterator, FixedBatches, make_held_out, make_iterator
from data_pipelines.feature_cache import Encoder
from data_pipelines.readers import Readers
from flamingo_jax.experiment import Experiment
from flamingo_jax.partitioning.host_shard import WHOLE_BATCH, HostShard
from flamingo_jax.processing.tokenizer import Tokenizer


def make_iterators(
    experiment: Experiment,
    tokenizer: Tokenizer,
    encoder: Encoder | None = None,
    host_shard: HostShard = WHOLE_BATCH,
    readers: Readers | None = None,
) -> dict[str, BatchIterator]:
    """Makes the iterators of `config.data`, {name: iterator}.

    Args:
      encoder: return its cached features instead of images.
      host_shard: which rows and visuals of each global batch this process reads.
      readers: threads that prefetch batches; None makes each batch when it is asked for.

    Raises: UserError for a dataset that cannot be read (see `make_iterator`).
    """
    options = _options(experiment, tokenizer, encoder, host_shard, readers)
    return {
        name: make_iterator(dataset, name=name, seed=experiment.seed, **options)
        for name, dataset in experiment.data.items()
    }


def held_out_batches(
    experiment: Experiment,
    tokenizer: Tokenizer,
    encoder: Encoder | None = None,
    host_shard: HostShard = WHOLE_BATCH,
    readers: Readers | None = None,
) -> dict[str, FixedBatches]:
    """Makes the first `training.evaluate_batches` batches of each of `config.held_out`, {name:
    batches}; a batch is read when it is asked for. Args and Raises as `make_iterators`.
    """
    options = _options(experiment, tokenizer, encoder, host_shard, readers)
    batches = experiment.training.evaluate_batches
    return {
        name: make_held_out(dataset, name=name, batches=batches, **options)
        for name, dataset in experiment.held_out.items()
    }


def summary_line(summary: Mapping[str, Any]) -> str:
    """Writes a dataset's summary (`data_pipelines.rows.RowReader.summary`) as one log line."""
    filled = "" if summary["fill"] is None else f" filled to {summary['fill']:.0%}"
    words = {
        "cut": "longer than a row",
        "too_long": "too long for any row",
        "dropped": "left out of an epoch",
    }
    rest = [f"{summary[key]:,} {what}" for key, what in words.items() if summary[key]]
    return ", ".join([f"{summary['records']:,} records in {summary['rows']:,} rows{filled}", *rest])


def _options(
    experiment: Experiment,
    tokenizer: Tokenizer,
    encoder: Encoder | None,
    host_shard: HostShard,
    readers: Readers | None,
) -> dict[str, Any]:
    """Collects the arguments of `make_iterator` and `make_held_out` that datasets share."""
    process = jax.process_index(), jax.process_count()
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "task": experiment.task,
        "host_shard": host_shard,
        "process": process,
        "encoder": encoder,
    }
    options["readers"] = readers
    vision = (
        experiment.contrastive.vision
        if experiment.contrastive
        else experiment.flamingo.vision
        if experiment.flamingo
        else None
    )
    if vision is not None:
        options |= {
            "image_size": vision.image_size,
            "mean": vision.mean,
            "image_fit": vision.image_fit,
        }
    if experiment.contrastive is not None:
        options["text_length"] = experiment.contrastive.text.max_length
    return options
