"""Builds model, optimizer and training state: first as shapes with shardings, then as arrays
that are created sharded, so that no device ever holds a whole large array.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flamingo_jax.distributed.process_group import ProcessGroup
from flamingo_jax.experiment import Experiment
from flamingo_jax.partitioning import rules
from flamingo_jax.tasks import stages
from flamingo_jax.training.optimizer import make_optimizer, make_schedule
from flamingo_jax.training.pretrained import load_warm_started
from flamingo_jax.training.state import TrainState, initial_state, split_model
from flamingo_jax.weight_parts import dtype_of


class TrainSetup(NamedTuple):
    """Everything known about a run before any array exists: shapes, shardings, functions."""

    graph: Any
    trainable: dict[str, jax.ShapeDtypeStruct]
    frozen: dict[str, jax.ShapeDtypeStruct]
    optimizer: optax.GradientTransformation
    schedule: Callable[[jax.Array], jax.Array]
    """Update number, from 0 -> learning rate."""
    state: TrainState
    """Shapes and shardings of the state, as ShapeDtypeStructs."""
    gradient_shardings: dict[str, NamedSharding]
    """Shardings that gradients are reduced to: those of the optimizer's moments."""


def make_setup(experiment: Experiment, mesh: Mesh) -> TrainSetup:
    """Computes the shapes and shardings of model, optimizer and state, without allocating."""
    model = nnx.eval_shape(
        lambda: stages.build_model(experiment, nnx.Rngs(params=jax.random.key(0)))
    )
    graph, shapes = split_model(model)
    unfrozen = stages.unfrozen(experiment)
    trainable_names = rules.trainable_names(experiment.task, shapes, unfrozen)
    shardings = rules.shardings(experiment.task, shapes, mesh, unfrozen)
    frozen_dtype = stages.frozen_dtype(experiment)

    def declare(name: str, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shapes[name].shape, dtype, sharding=shardings[name])

    trainable = {name: declare(name, jnp.float32) for name in shapes if name in trainable_names}
    frozen = {
        name: declare(name, jnp.dtype(dtype_of(name, frozen_dtype)))
        for name in shapes
        if name not in trainable_names
    }
    optimizer, state = state_shapes(experiment, trainable)
    state = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(
            s.shape, s.dtype, sharding=NamedSharding(mesh, PartitionSpec())
        ),
        state,
    )
    moment_shardings = rules.moment_shardings(trainable)
    # Leaves of the optimizer state that mirror parameters get the moments' shardings; others,
    # such as counts, stay replicated.
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state.optimizer,
        moment_shardings,
    )
    schedule = make_schedule(
        experiment.optimizer, experiment.training.steps, updates_per_step(experiment)
    )
    return TrainSetup(
        graph,
        trainable,
        frozen,
        optimizer,
        schedule,
        state._replace(trainable=trainable, optimizer=moments),
        moment_shardings,
    )


def state_shapes(
    experiment: Experiment, trainable: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[optax.GradientTransformation, TrainState]:
    """Makes the optimizer for the trained parameters, and the shapes of the TrainState."""
    optimizer = make_optimizer(
        experiment.optimizer, experiment.training.steps, trainable, updates_per_step(experiment)
    )
    return optimizer, jax.eval_shape(lambda p: initial_state(p, optimizer, 0), dict(trainable))


def updates_per_step(experiment: Experiment) -> int:
    """Returns how many optimizer updates a step makes."""
    return len(experiment.data) if experiment.training.round_robin else 1


def initialise(
    experiment: Experiment, setup: TrainSetup, process_group: ProcessGroup | None = None
) -> TrainState:
    """Initialises the state on its devices: random parameters, except those that start from
    pretrained weights (`load_warm_started`). Frozen parameters are not created here.

    process_group: the run's processes; by default a single one.
    """

    def make(key: jax.Array) -> TrainState:
        _, parameters = split_model(stages.build_model(experiment, nnx.Rngs(params=key)))
        return initial_state(
            {name: parameters[name] for name in setup.trainable},
            setup.optimizer,
            experiment.seed,
        )

    # The model is built inside jit; XLA removes what is not returned (frozen
    # parameters), and creates the rest with its sharding.
    shardings = jax.tree.map(lambda s: s.sharding, setup.state)
    warm_started = load_warm_started(experiment, setup.trainable, process_group)
    state = jax.jit(make, out_shardings=shardings)(jax.random.key(experiment.seed))
    return state._replace(trainable=state.trainable | warm_started)
