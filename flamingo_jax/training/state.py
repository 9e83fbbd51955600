"""Makes, splits and merges what training changes: one pytree of arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from flamingo_jax.models.weights import make_dense
from flamingo_jax.pytrees import from_flat, to_flat
from flamingo_jax.weight_parts import weight_part

Array = jax.Array
Parameters = dict[str, Array]


class TrainState(NamedTuple):
    """Holds what a checkpoint does besides data positions and clock; frozen parameters are not in
    it.
    """

    step: Array
    """int32 scalar: updates so far, skipped ones among them."""
    trainable: Parameters
    """float32, by flat name."""
    optimizer: optax.OptState
    key: Array
    """uint32 [2], raw data of the run's PRNG key; step keys are folded from it."""
    skipped: Array
    """int32 scalar: steps skipped because they were not finite."""
    skipped_in_a_row: Array
    """int32 scalar."""


def split_model(model: nnx.Module) -> tuple[Any, Parameters]:
    """Splits a module into its static graph and its parameters by flat name ("a/b/c")."""
    graph, state = nnx.split(model)
    return graph, to_flat(state)


def merge_model(graph: Any, *parameters: Parameters) -> Any:
    """Makes the module again, from its graph and one or more dicts that together hold all its
    parameters.
    """
    merged: Parameters = {}
    for part in parameters:
        merged |= part
    return nnx.merge(graph, nnx.State(from_flat(merged)))


def dense_parameters(graph: Any, parameters: Parameters) -> Parameters:
    """Parameters with one array for each weight, as exports hold them: low-rank updates are
    added to what they update.
    """
    if not any(weight_part(name) for name in parameters):
        return parameters
    model = merge_model(graph, parameters)
    make_dense(model)
    return split_model(model)[1]


def initial_state(
    trainable: Parameters, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """Makes the state of a run's start; `seed` gives the keys of all its steps."""
    zero = jnp.int32(0)
    return TrainState(
        zero,
        trainable,
        optimizer.init(trainable),
        jax.random.key_data(jax.random.key(seed)),
        zero,
        zero,
    )
