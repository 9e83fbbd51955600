"""Counts the parameters of an experiment's model, part by part, and the bytes of its
checkpoints, from shapes alone.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from flamingo_jax.experiment import Experiment
from flamingo_jax.partitioning.rules import trainable_names
from flamingo_jax.pytrees import to_flat
from flamingo_jax.tasks import stages
from flamingo_jax.training.setup import state_shapes
from flamingo_jax.weight_parts import dtype_of, is_multiplied

PARTS_IN_ORDER = (
    "vision_encoder",
    "resampler",
    "visual_projection",
    "gated_xattn",
    "language_model",
    "grafted",
    "extra_embedding",
)
"""The parts of a Flamingo in the order of the data flow, from image to text."""


def parameter_shapes(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {flat name: shape and dtype} of every parameter of the task's model, by tracing
    the real modules without allocating arrays.
    """
    model = nnx.eval_shape(
        lambda: stages.build_model(experiment, nnx.Rngs(params=jax.random.key(0)))
    )
    return to_flat(nnx.state(model))


class PartCount(NamedTuple):
    """Holds the number of parameters of a part of the model, and how many of them are
    trained.
    """

    parameters: int
    trained: int


def count_parts(experiment: Experiment) -> dict[str, PartCount]:
    """Counts the parameters of each part of the task's model.

    The parts are the top-level modules, for a Flamingo those of `PARTS_IN_ORDER` (the
    larger ones are in the paper's table 5); a language model is one part.
    """
    shapes = parameter_shapes(experiment)
    # The scales of int8 weights do not count as parameters of the model.
    sizes = {name: math.prod(s.shape) for name, s in shapes.items() if is_multiplied(name)}
    trained = trainable_names(experiment.task, sizes, stages.unfrozen(experiment))
    order = PARTS_IN_ORDER if experiment.task == "flamingo" else ()
    parts: dict[str, PartCount] = {}
    for name in sorted(sizes, key=lambda name: _place(name, order)):
        part = "language_model" if experiment.task == "language_modelling" else name.split("/")[0]
        size, before = sizes[name], parts.get(part, PartCount(0, 0))
        parts[part] = PartCount(
            before.parameters + size, before.trained + (size if name in trained else 0)
        )
    return parts


def _place(name: str, order: Sequence[str]) -> int:
    part = name.split("/")[0]
    return order.index(part) if part in order else len(order)


def count_parameters(experiment: Experiment) -> dict[str, int]:
    """Counts the parameters of each part, the trained ones ("trainable") and all ("total")."""
    parts = count_parts(experiment)
    return {part: count.parameters for part, count in parts.items()} | {
        "trainable": sum(count.trained for count in parts.values()),
        "total": sum(count.parameters for count in parts.values()),
    }


def checkpoint_bytes(experiment: Experiment) -> dict[str, int]:
    """Computes the bytes of a checkpoint: "trainables" and their "moments" in float32, "rest"
    (step, key, counters) and "total".

    "frozen" are bytes that are not in the checkpoint: frozen parameters as they are in the
    devices' memory (`training.frozen_dtype`), read from the exports they came from. Data
    positions, the clock, the config and the manifest are some kilobytes more.
    """
    shapes = parameter_shapes(experiment)
    trained = trainable_names(experiment.task, shapes, stages.unfrozen(experiment))
    _, state = state_shapes(
        experiment,
        {
            name: jax.ShapeDtypeStruct(shapes[name].shape, jnp.float32)
            for name in shapes
            if name in trained
        },
    )

    def size(tree: object) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    total, trainables = size(state), size(state.trainable)
    moments = size([optax.tree.get(state.optimizer, name) for name in ("mu", "nu")])
    dtype = stages.frozen_dtype(experiment)
    frozen = sum(
        shape.size * jnp.dtype(dtype_of(name, dtype)).itemsize
        for name, shape in shapes.items()
        if name not in trained
    )
    return {
        "trainables": trainables,
        "moments": moments,
        "rest": total - trainables - moments,
        "total": total,
        "frozen": frozen,
    }
