"""Where activations lie on the mesh. Every function reads the mesh that `jax.set_mesh` has set
and does nothing without one.

The residual stream lies over `model` along the sequence between the parts that Megatron splits
by heads and hidden units (Korthikanti et al. 2022): norms are not computed once more on every
device, what is saved for the gradient shrinks by as much, and the same bytes are sent.
"""

import math

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from flamingo_jax.partitioning.mesh import AXES, MODEL, ROWS

Array = jax.Array
Axis = str | tuple[str, ...] | None


def shards(axes: Axis) -> int:
    """Counts over how many devices these axes of the mesh spread an array; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return (
        1
        if mesh.empty
        else math.prod(
            mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ())
        )
    )


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": of the mesh's devices, or the default ones without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return (
        jax.default_backend()
        if mesh.empty or mesh.abstract_device is None
        else mesh.abstract_device.platform
    )


def row_shards() -> int:
    """Counts how many devices, or groups of devices along `model`, share a batch's rows; 1
    without a mesh.
    """
    return shards(ROWS)


def constrain(x: Array, *axes: Axis) -> Array:
    """Lays `x` with its leading axes over these axes of the mesh, those that do not divide left
    whole, as are the axes that are not named.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = [
        axis if shards(axis) > 1 and x.shape[place] % shards(axis) == 0 else None
        for place, axis in enumerate(axes)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _in_memory(x: Array, order: tuple[int, ...]) -> Array:
    """Lays, on TPUs, `x` with its axes in this order in memory, the last the fastest. The
    compiler's own choice is another at times, with copies around it.

    Not where `model` shards: what lies over several axes the compiler would first gather whole
    on every device.
    """
    return (
        with_layout_constraint(x, Layout(major_to_minor=order))
        if platform() == "tpu" and shards(MODEL) == 1
        else x
    )


def heads_first(scores: Array) -> Array:
    """Lays attention's scores [B, H, L, S] as the products with the heads' weights leave queries
    and keys: no copy brings rows before heads.
    """
    return _in_memory(scores, (1, 0, 2, 3))


def residual(x: Array) -> Array:
    """Lays the residual stream [B, L, D] between blocks: rows over data and fsdp, the sequence over
    model.
    """
    return _in_memory(constrain(x, ROWS, MODEL), (0, 1, 2))


@jax.custom_vjp
def all_gather(x: Array) -> Array:
    """Gathers [B, L, D] before products whose weights lie over model: the whole sequence on each
    device. Its gradient is summed over model to where the residual stream lies.
    """
    return constrain(x, ROWS, None)


@jax.custom_vjp
def reduce_scatter(x: Array) -> Array:
    """Does the inverse of `all_gather`: [B, L, D] after products that each device has a part of,
    summed over model to where the residual stream lies.
    Its gradient is gathered: left to itself, the compiler may gather the weights of those
    products instead, on every device.
    """
    return constrain(x, ROWS, MODEL)


all_gather.defvjp(lambda x: (all_gather(x), None), lambda _, dy: (constrain(dy, ROWS, MODEL),))
reduce_scatter.defvjp(
    lambda x: (reduce_scatter(x), None), lambda _, dy: (constrain(dy, ROWS, None),)
)


def everywhere(x: Array) -> Array:
    """Lays the first axis over all devices: for the vision encoder, which runs data-parallel."""
    return constrain(x, AXES)
