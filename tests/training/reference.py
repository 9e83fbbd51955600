"""The gradient of several datasets in its simplest form."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flamingo_jax.experiment import DatasetConfig
from flamingo_jax.tasks.task import Batch, Task
from flamingo_jax.training.step import Gradients, gradients

Array = jax.Array


def dataset_after_dataset(
    graph: Any,
    task: Task,
    trainable: dict[str, Array],
    frozen: dict[str, Array],
    batches: Mapping[str, Batch],
    key: Array,
    datasets: Mapping[str, DatasetConfig],
) -> Gradients:
    """Each dataset goes through the model alone, and gradients are added (paper 2.4)."""
    found = Gradients({}, {}, {})
    for name, batch in batches.items():
        alone = gradients(graph, task, trainable, frozen, {name: batch}, key, datasets)
        added = jax.tree.map(jnp.add, found.gradient, alone.gradient) if found.gradient else None
        found = Gradients(
            found.losses | alone.losses, added or alone.gradient, found.norms | alone.norms
        )
    return found
