"""The training state, one pytree of arrays, and its conversion from and to an NNX model."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from flamingo_jax.pytrees import from_flat, to_flat

Array = jax.Array
Parameters = dict[str, Array]


class TrainState(NamedTuple):
    """The arrays that an update changes and a checkpoint holds; frozen parameters are not
    among them.
    """

    step: Array
    """int32 scalar: updates so far, skipped ones among them."""
    trainable: Parameters
    """{"resampler/latents": float32 array, ...}"""
    optimizer: optax.OptState
    key: Array
    """uint32 [2], raw data of the run's PRNG key; each step folds its number into it."""
    skipped: Array
    """int32 scalar: steps skipped because they were not finite."""
    skipped_in_a_row: Array
    """int32 scalar: how many of them since the last finite step."""


def split_model(model: nnx.Module) -> tuple[Any, Parameters]:
    """Splits a module into its static graph and its parameters by flat name ("a/b/c")."""
    graph, state = nnx.split(model)
    return graph, to_flat(state)


def merge_model(graph: Any, *parameters: Parameters) -> Any:
    """Rebuilds the module from its graph and the dicts that together hold all its parameters:
    the inverse of `split_model`.
    """
    merged: Parameters = {}
    for part in parameters:
        merged |= part
    return nnx.merge(graph, nnx.State(from_flat(merged)))


def initial_state(
    trainable: Parameters, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """Makes the state at step 0; the keys of all steps derive from `seed`."""
    zero = jnp.int32(0)
    return TrainState(
        zero,
        trainable,
        optimizer.init(trainable),
        jax.random.key_data(jax.random.key(seed)),
        zero,
        zero,
    )
