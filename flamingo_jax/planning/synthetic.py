"""Makes random batches for benchmarks, with full rows and the largest number of visuals."""

import numpy as np

from flamingo_jax.experiment import DatasetConfig, Experiment
from flamingo_jax.partitioning.host_shard import WHOLE_BATCH, HostShard
from flamingo_jax.processing.jitter import FIELDS
from flamingo_jax.tasks import stages


def full_batches(
    experiment: Experiment, host_shard: HostShard = WHOLE_BATCH
) -> dict[str, dict[str, np.ndarray]]:
    """Makes this process's part of random batches for a Flamingo or a language model.

    Returns: {dataset: {array: values}}, as `data_pipelines.batches` makes them.
    """
    rng = np.random.default_rng(0)
    return {
        name: _full_batch(experiment, dataset, host_shard, rng)
        for name, dataset in experiment.data.items()
    }


def _full_batch(
    experiment: Experiment, dataset: DatasetConfig, host_shard: HostShard, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    config = stages.model_config(experiment)
    length, places = dataset.max_length, dataset.visuals
    shape, whole = (
        (len(host_shard.rows(dataset.batch_size)), length),
        np.arange(length, dtype=np.int32),
    )
    vocabulary = (config.language_model if experiment.task == "flamingo" else config).vocab_size
    batch = {
        "tokens": rng.integers(0, vocabulary, shape, dtype=np.int32),
        "positions": np.broadcast_to(whole, shape).copy(),
        "segments": np.ones(shape, np.int32),
        "loss_mask": np.ones(shape, bool),
    }
    if experiment.task != "flamingo":
        return batch
    if dataset.kind == "text":
        # Text without visuals: no token attends to any.
        return batch | {"media_index": np.full(shape, -1, np.int32)}
    size, listed = config.vision.image_size, host_shard.visuals(dataset.batch_size, places)
    return batch | {
        # Visuals are spread evenly over the row, the first at its start.
        "media_index": np.broadcast_to(whole * places // length, shape).astype(np.int32),
        "visuals": host_shard.row_visuals(dataset.batch_size, places),
        "frame_mask": np.repeat(listed[:, None] >= 0, dataset.frames, axis=1),
        "images": rng.integers(
            0, 256, (len(listed), dataset.frames, size, size, 3), dtype=np.uint8
        ),
        **({"jitter": _jitter(len(listed), dataset.frames, size)} if dataset.colour else {}),
    }


def _jitter(visuals: int, frames: int, size: int) -> np.ndarray:
    """Makes jitter parameters that change no colour, at the same cost as any others."""
    return np.broadcast_to(
        np.array([1, 1, 1, 0, size, size], np.float32), (visuals, frames, len(FIELDS))
    ).copy()
