"""Reads float weights from files into int8 with scales, a few layers of one weight at a time, so
that neither host nor devices ever hold the float weights of a whole model.
"""

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from flamingo_jax.distributed.process_group import ProcessGroup
from flamingo_jax.models.int8 import STORED, Quantised
from flamingo_jax.progress import Bar
from flamingo_jax.pytrees import STACK
from flamingo_jax.weight_parts import float_name, is_scale, weight_and_part

if TYPE_CHECKING:
    from flamingo_jax.interop.weight_sources import WeightSource

AT_ONCE = 2**26
"""Bytes of float weights that are read at a time, over all devices: as many layers as fit, but
at least one. Quantising them takes several times as much, in float32.
"""
SHORT = 2**28
"""Below this number of bytes no progress bar is shown, since reading is over at once."""


def read_quantised(
    source: "WeightSource",
    targets: Mapping[str, jax.ShapeDtypeStruct],
    process_group: ProcessGroup | None = None,
) -> dict[str, jax.Array]:
    """Reads parameters with the dtypes and shardings of `targets`; those of int8 weights,
    NAME/int8 and the scales beside it, are quantised from NAME in the source as it is read.

    Weights are read in the dtype on disk, so that they are rounded once.
    """
    whole, weights = {}, {}
    for name, target in targets.items():
        weight, part = weight_and_part(name)
        if float_name(name) == name:
            whole[name] = target
        elif is_scale(name):
            weights[weight] = part
    found = source.read(whole, process_group) if whole else {}
    dtypes = source.dtypes
    sizes = {
        name: math.prod(source.shapes[name]) * np.dtype(dtypes[name]).itemsize for name in weights
    }
    total = sum(sizes.values())
    with Bar("quantising to int8", total >> 20, enabled=total >= SHORT) as bar:
        done = 0
        for name, scales in weights.items():
            pair = Quantised(targets[f"{name}/int8"], targets[f"{name}/{scales}"])
            made = _read_weight(source, process_group, name, scales, pair)
            found |= {f"{name}/int8": made.int8, f"{name}/{scales}": made.scale}
            before, done = done, done + sizes[name]
            bar.advance((done >> 20) - (before >> 20), "MiB")
    return found


def _read_weight(
    source: "WeightSource",
    process_group: ProcessGroup | None,
    name: str,
    scales: str,
    target: Quantised,
) -> Quantised:
    """Reads and quantises one weight, a stack a few layers at a time."""
    shape, dtype = target.int8.shape, source.dtypes[name]
    stacked = name.split("/").count(STACK)
    shardings = Quantised(target.int8.sharding, target.scale.sharding)
    quantise = _quantiser(scales, stacked, len(shape) - target.scale.ndim, shardings)

    def read(layers: range | None) -> Quantised:
        some = shape if layers is None else (len(layers), *shape[1:])
        like = jax.ShapeDtypeStruct(some, dtype, sharding=target.int8.sharding)
        return quantise(source.read({name: like}, process_group, layers)[name])

    count = shape[0] if stacked == 1 else 1
    each = max(1, AT_ONCE // (math.prod(shape) // count * np.dtype(dtype).itemsize))
    if each >= count:
        return read(None)
    made = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), target)
    for first in range(0, count, each):
        part = read(range(first, min(first + each, count)))
        # Waits: otherwise the next layers would be read before these are freed.
        made = jax.block_until_ready(_placer(shardings)(made, part, np.int32(first)))
    return made


@functools.cache
def _quantiser(scales: str, stacked: int, inputs: int, shardings: Quantised) -> Any:
    """Compiles the quantisation of a kind of weight, into its shards."""
    return jax.jit(lambda w: STORED[scales](w, stacked, inputs), out_shardings=_given(shardings))


@functools.cache
def _placer(shardings: Quantised) -> Any:
    """Compiles the function that writes layers into a stack from layer number `first` on."""

    def place(stack: Quantised, part: Quantised, first: jax.Array) -> Quantised:
        return jax.tree.map(
            lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, first, 0), stack, part
        )

    return jax.jit(place, out_shardings=_given(shardings), donate_argnums=0)


def _given(shardings: Quantised) -> Quantised | None:
    """Returns output shardings for jit; None where the targets name no devices."""
    return None if shardings.int8 is None else shardings
