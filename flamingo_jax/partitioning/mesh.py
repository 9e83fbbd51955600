"""The mesh of devices: `data` (replicas), `fsdp` (parameters and moments sharded, gathered to use), `model` (Megatron)."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment, MeshConfig

AXES = ("data", "fsdp", "model")


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh over all devices; a UserError where the sizes do not multiply to their number."""
    sizes = [config.data, config.fsdp, config.model]
    devices = jax.device_count()
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"config.mesh has the sizes {dict(zip(AXES, sizes, strict=True))}: use positive numbers and -1 at most once")
    given = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and devices % given == 0:
        sizes[sizes.index(-1)] = devices // given
    if int(np.prod(sizes)) != devices:
        raise UserError(
            f"config.mesh asks for {' x '.join(map(str, sizes))} devices as data x fsdp x model, but there are {devices}: change a size, or set one to -1"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (and the visuals, which lie in the order of their rows) over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batches(experiment: Experiment, mesh: Mesh) -> None:
    """A UserError where a dataset's rows do not divide over the mesh and its microbatches."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for group in ("data", "held_out"):
        for name, dataset in getattr(experiment, group).items():
            parts = shards * (dataset.microbatches if group == "data" else 1)
            if dataset.batch_size < 1 or dataset.batch_size % parts:
                fit = max(dataset.batch_size // parts, 1) * parts
                raise UserError(
                    f"config.{group}.{name}.batch_size is {dataset.batch_size}, which does not divide over {shards} data shards "
                    f"x {parts // shards} microbatches: make it {fit}, or change the mesh"
                )
