"""How many parameters an experiment's model has, part by part, without allocating any."""

import math

import jax
from flax import nnx

from flamingo_jax.experiment import Experiment
from flamingo_jax.partitioning.rules import trainable_names
from flamingo_jax.pytrees import to_flat
from flamingo_jax.tasks import stages

FLOW = ("vision_encoder", "resampler", "visual_projection", "gated_xattn", "language_model", "extra_embedding")
"""The parts of a Flamingo in the order in which a picture meets them."""


def parameter_shapes(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape of every parameter of the task's model, by flat name, from the real modules traced abstractly."""
    model = nnx.eval_shape(lambda: stages.build_model(experiment, nnx.Rngs(params=jax.random.key(0))))
    return to_flat(nnx.state(model))


def count_parameters(experiment: Experiment) -> dict[str, int]:
    """Parameters of each part, of what the task trains, and of the whole.

    Parts are the model's own, for Flamingo those of `FLOW` (the paper's table 5 has the larger ones); a language model is one part. Then
    "trainable" and "total".
    """
    shapes = parameter_shapes(experiment)
    sizes = {name: math.prod(shape.shape) for name, shape in shapes.items()}
    parts: dict[str, int] = dict.fromkeys(FLOW, 0) if experiment.task == "flamingo" else {}
    for name, size in sizes.items():
        part = "language_model" if experiment.task == "language_modelling" else name.split("/")[0]
        parts[part] = parts.get(part, 0) + size
    trained = trainable_names(experiment.task, sizes, stages.unfrozen(experiment))
    return parts | {"trainable": sum(sizes[name] for name in trained), "total": sum(sizes.values())}
