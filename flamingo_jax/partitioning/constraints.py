"""Sharding constraints on activations. Every function uses the mesh of `jax.set_mesh`, and
does nothing without one.

Sequence parallelism (Korthikanti et al. 2022): between the layers that Megatron splits by
heads and hidden units, the residual stream is sharded over `model` along the sequence. So
norms are not repeated on every device, saved activations are divided by as many, and the
communication is the same: an all-gather before and a reduce-scatter after, instead of an
all-reduce.
"""

import math

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from flamingo_jax.partitioning.mesh import AXES, MODEL, ROWS

Array = jax.Array
Axis = str | tuple[str, ...] | None


def shards(axes: Axis) -> int:
    """Returns into how many shards these mesh axes divide an array; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return (
        1
        if mesh.empty
        else math.prod(
            mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ())
        )
    )


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": of the mesh, or the default backend without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return (
        jax.default_backend()
        if mesh.empty or mesh.abstract_device is None
        else mesh.abstract_device.platform
    )


def row_shards() -> int:
    """Returns the number of shards of a batch's rows, data * fsdp; 1 without a mesh."""
    return shards(ROWS)


def constrain(x: Array, *axes: Axis) -> Array:
    """Shards the leading axes of `x` over these mesh axes, in order. An axis that does not
    divide is replicated, as are further axes of `x`.
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
    """Fixes the memory layout of `x` on TPUs: its axes from slowest to fastest. Otherwise the
    compiler sometimes chooses another one, and copies before and after.

    Not with tensor parallelism: with a layout constraint the compiler would first gather an
    array that is sharded over several axes.
    """
    return (
        with_layout_constraint(x, Layout(major_to_minor=order))
        if platform() == "tpu" and shards(MODEL) == 1
        else x
    )


def heads_first(scores: Array) -> Array:
    """Fixes the layout of attention scores [B, H, L, S] with heads outermost, as the products
    with the heads' weights leave queries and keys, so that no transpose is needed.
    """
    return _in_memory(scores, (1, 0, 2, 3))


def residual(x: Array) -> Array:
    """Shards the residual stream [B, L, D] between blocks: rows over data and fsdp, the
    sequence over model.
    """
    return _in_memory(constrain(x, ROWS, MODEL), (0, 1, 2))


@jax.custom_vjp
def all_gather(x: Array) -> Array:
    """All-gathers [B, L, D] over `model` along the sequence, before products whose weights are
    sharded over `model`. Its gradient is reduce-scattered.
    """
    return constrain(x, ROWS, None)


@jax.custom_vjp
def reduce_scatter(x: Array) -> Array:
    """Sums the partial products [B, L, D] over `model` and scatters the result along the
    sequence: the inverse of `all_gather`.

    Its gradient is all-gathered explicitly: otherwise the compiler may gather those products'
    weights on every device instead.
    """
    return constrain(x, ROWS, MODEL)


all_gather.defvjp(lambda x: (all_gather(x), None), lambda _, dy: (constrain(dy, ROWS, MODEL),))
reduce_scatter.defvjp(
    lambda x: (reduce_scatter(x), None), lambda _, dy: (constrain(dy, ROWS, None),)
)


def shard_over_all_devices(x: Array) -> Array:
    """Shards the first axis over all devices, for the data-parallel vision encoder."""
    return constrain(x, AXES)
