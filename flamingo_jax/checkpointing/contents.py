"""Names, dtypes and shapes of the arrays in a checkpoint, compared before it is restored."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from flamingo_jax.errors import UserError


def named_arrays(tree: Any) -> dict[str, Any]:
    """Returns {path: leaf} of a pytree, with paths like
    "trainable/gated_xattn/layers/query".
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same name: rename one")
    return named


def require_saveable(name: str, value: Any) -> None:
    """Raises TypeError for a value that is not a jax.Array, or for a typed PRNG key."""
    if not isinstance(value, jax.Array):
        raise TypeError(
            f"the state's {name} is {type(value).__name__}, but a checkpoint holds jax.Arrays;"
            " other data belong in `extra`"
        )
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"the state's {name} is a typed PRNG key: save jax.random.key_data(key) instead"
        )


def dtype_and_shape(value: Any) -> list[Any]:
    """Returns [dtype name, *shape] of an array, for JSON: ["float32", 24, 2048]."""
    return [jnp.dtype(value.dtype).name, *value.shape]


def require_same_arrays(
    saved: dict[str, list[Any]], wanted: dict[str, Any], folder: pathlib.Path
) -> None:
    """Raises a UserError that names the first arrays in which a checkpoint and a state differ.

    saved: {name: result of `dtype_and_shape`}. wanted: {name: anything with dtype and shape}.
    """
    differing = [
        f"{name} is {_describe(saved.get(name))} in the checkpoint and"
        f" {_describe(dtype_and_shape(wanted[name]) if name in wanted else None)} here"
        for name in [*wanted, *(name for name in saved if name not in wanted)]
        if name not in saved or name not in wanted or saved[name] != dtype_and_shape(wanted[name])
    ]
    if differing:
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"{folder} was made by another model or optimizer:"
            f" {'; '.join(differing[:3])}{more}: use the config it was made with or a new"
            " workdir"
        )


def _describe(kind: list[Any] | None) -> str:
    return "absent" if kind is None else f"{kind[0]} {kind[1:]}"
