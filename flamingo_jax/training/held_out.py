"""The evaluator of losses on held-out datasets, with and without images."""

import collections
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from flamingo_jax.experiment import DatasetConfig, Experiment
from flamingo_jax.training.prefetcher import HostBatch, shard_batch
from flamingo_jax.training.setup import TrainSetup
from flamingo_jax.training.state import Parameters
from flamingo_jax.training.step import WITHOUT_IMAGES, make_held_out_loss

NAME = "held_out"
"""The evaluator's name: its metrics are held_out/<dataset>/<metric>."""


class HeldOutLosses:
    """Measures each held-out dataset's loss with its images and without them (the difference
    shows whether the model uses the images), and their weighted sum, as in training.

    An `Evaluator` with period `config.training.evaluate_every`.

    Args:
      batches: each dataset's batches, the same at every iteration, all of one shape. A
        dataset's microbatches and weight are those of `config.held_out`, or the defaults if it
        is not there.
    """

    def __init__(
        self,
        setup: TrainSetup,
        task: Any,
        batches: Mapping[str, Iterable[HostBatch]],
        experiment: Experiment,
        mesh: jax.sharding.Mesh,
    ):
        self.every = experiment.training.evaluate_every
        self._batches, self._mesh = batches, mesh
        configs = {name: experiment.held_out.get(name, DatasetConfig()) for name in batches}
        self._weights = {name: config.weight for name, config in configs.items()}
        self._losses: dict[str, Any] = {
            name: jax.jit(make_held_out_loss(setup.graph, task, config.microbatches))
            for name, config in configs.items()
        }

    def compile(self, trainable: Parameters, frozen: Parameters) -> dict[str, jax.stages.Compiled]:
        """Compiles each dataset's program for the shapes of its first batch."""
        made: dict[str, jax.stages.Compiled] = {}
        for name, batches in self._batches.items():
            first = next(iter(batches), None)
            if first is not None:
                made[name] = (
                    self._losses[name]
                    .lower(trainable, frozen, shard_batch(first, self._mesh))
                    .compile()
                )
        self._losses |= made
        return made

    def __call__(self, trainable: Parameters, frozen: Parameters) -> dict[str, float]:
        """Measures {"<dataset>/<metric>": value} over all batches, those without images with
        the suffix "_without_images"; and "loss", the datasets' weighted sum.
        """
        values: dict[str, float] = {}
        for name, batches in self._batches.items():
            sums: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
            for host in batches:
                # Sums of (numerator, denominator) over batches, in float64.
                losses = jax.device_get(
                    self._losses[name](trainable, frozen, shard_batch(host, self._mesh))
                )
                for suffix, loss in losses.items():
                    for metric, pair in (
                        {"loss": (loss.total, loss.weight)} | loss.metrics
                    ).items():
                        sums[f"{name}/{metric}{suffix}"] += np.array(pair, np.float64)
            values |= {metric: float(a / max(b, 1e-9)) for metric, (a, b) in sums.items()}
        # The weighted sum, if every dataset has such a loss.
        for suffix in ("", WITHOUT_IMAGES):
            found = {name: values.get(f"{name}/loss{suffix}") for name in self._batches}
            if found and None not in found.values():
                values[f"loss{suffix}"] = sum(
                    self._weights[name] * loss for name, loss in found.items() if loss is not None
                )
        return values
