"""Losses on held-out datasets."""

import collections
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flamingo_jax.training.assembly import Assembly
from flamingo_jax.training.feed import HostBatch, put
from flamingo_jax.training.state import Parameters, TrainState
from flamingo_jax.training.step import make_held_out_loss


class HeldOut:
    """Each held-out dataset's loss, with its pictures and without them, so that one sees whether the model looks; and the weighted sum of them,
    as training has it."""

    def __init__(
        self, assembly: Assembly, task: Any, batches: Mapping[str, list[HostBatch]], weights: Mapping[str, float], mesh: jax.sharding.Mesh
    ):
        self._batches, self._weights, self._mesh, self._task = batches, weights, mesh, task
        self._loss = jax.jit(make_held_out_loss(assembly.graph, task))

    def __call__(self, state: TrainState, frozen: Parameters) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, batches in self._batches.items():
            sums: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
            for host in batches:
                batch = put(host, self._mesh)
                for suffix, part in (("", batch), ("_without_pictures", self._task.without_pictures(batch))):
                    if part is None:
                        continue
                    loss = jax.device_get(self._loss(state.trainable, frozen, part))
                    for metric, pair in ({"loss": (loss.total, loss.weight)} | loss.metrics).items():
                        sums[f"held_out/{name}/{metric}{suffix}"] += np.array(pair, np.float64)
            values |= {metric: float(a / max(b, 1e-9)) for metric, (a, b) in sums.items()}
        for suffix in ("", "_without_pictures"):
            losses = {name: values.get(f"held_out/{name}/loss{suffix}") for name in self._batches}
            if losses and None not in losses.values():
                values[f"held_out/loss{suffix}"] = sum(self._weights.get(name, 1.0) * loss for name, loss in losses.items() if loss is not None)
        return values
