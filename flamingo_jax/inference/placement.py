"""Where a model and its batches lie: on one device, or sharded over a mesh.

On a mesh the parameters follow training's table of rules: Megatron over `model`, and over
`fsdp` the trained matrices, which are gathered layer by layer where they are used. Frozen
matrices are whole on every device of `data` and `fsdp` as long as they fit, since a decoding
step that gathers weights waits for the links; where they do not, `fsdp` shards them too. The
rows of a batch and of the decoding cache lie over `data` and `fsdp`, heads over `model`, and
the images of the vision encoder over all devices.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import FlamingoConfig
from flamingo_jax.partitioning import rules
from flamingo_jax.partitioning.mesh import AXES, DATA, FSDP, MODEL, ROWS

WEIGHTS_SHARE = 0.75
"""The share of a device's memory that weights may fill: caches, logits and the working memory
of prefill need the rest.
"""


def check_mesh(config: FlamingoConfig, mesh: Mesh) -> None:
    """Checks that a mesh can hold the model.

    Raises: UserError where its axes are others than data, fsdp and model, or `model` is no
      divisor of the language model's heads.
    """
    if tuple(mesh.axis_names) != AXES:
        raise UserError(
            f"the mesh has the axes {', '.join(map(str, mesh.axis_names))}, but a model is laid"
            f" out over {', '.join(AXES)}: make it with flamingo_jax.make_mesh"
        )
    heads, shards = config.language_model.attention.heads, mesh.shape[MODEL]
    if heads % shards:
        fitting = [size for size in range(1, heads + 1) if heads % size == 0]
        raise UserError(
            f"the mesh has model={shards}, but the language model's {heads} heads do not divide"
            f" over it: choose model from {', '.join(map(str, fitting))}"
        )


def parameter_shardings(
    parameters: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh, memory: int | None = None
) -> dict[str, NamedSharding]:
    """Chooses each parameter's sharding for inference, see the head of this file.

    Args:
      parameters: {flat name: shape and dtype}, stacks with their leading layer axis.
      memory: bytes of each device; by default what the devices here say, which CPUs do not.

    Raises: UserError where the parameters do not fit the devices, or a large one cannot be
      sharded.
    """
    memory = memory or _device_memory(mesh)
    found = rules.shardings("flamingo", parameters, mesh)
    if memory is None or bytes_per_device(parameters, found) <= WEIGHTS_SHARE * memory:
        return found
    gathered = rules.shardings("flamingo", parameters, mesh, gather_frozen=True)
    needed = bytes_per_device(parameters, gathered)
    if needed > WEIGHTS_SHARE * memory:
        sizes = ",".join(f"{axis}={mesh.shape[axis]}" for axis in AXES)
        raise UserError(
            f"on the mesh {sizes} the weights take {needed / 2**30:.1f} GiB of a device's"
            f" {memory / 2**30:.1f}, of which {WEIGHTS_SHARE:.0%} are theirs: give model or fsdp"
            " more devices"
        )
    return gathered


def _device_memory(mesh: Mesh) -> int | None:
    """Asks the devices for their memory in bytes, the least of them; None if they do not say."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in mesh.local_devices]
    mebibytes = np.int32(min(limits) >> 20)
    if mesh.is_multi_process:
        # All processes must choose the same shardings.
        mebibytes = np.asarray(multihost_utils.process_allgather(mebibytes)).min()
    return int(mebibytes) << 20 or None


def bytes_per_device(
    parameters: Mapping[str, jax.ShapeDtypeStruct], shardings: Mapping[str, NamedSharding]
) -> int:
    """Computes the bytes of all parameters on one device."""
    return sum(
        math.prod(shardings[name].shard_shape(p.shape)) * np.dtype(p.dtype).itemsize
        for name, p in parameters.items()
    )


@dataclasses.dataclass(frozen=True)
class Placement:
    """Puts the arrays of batches where a model's parameters are, and gets results back.

    mesh: None for a single device, the default one, where nothing is sharded.
    """

    mesh: Mesh | None = None

    @classmethod
    def of(cls, parameters: Any) -> "Placement":
        """Returns the placement of a pytree of parameters: the mesh that they lie on, if it has
        several devices.
        """
        for leaf in jax.tree.leaves(parameters):
            sharding = getattr(leaf, "sharding", None)
            mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
            if isinstance(mesh, Mesh) and mesh.size > 1 and tuple(mesh.axis_names) == AXES:
                return cls(mesh)
        return cls()

    @property
    def row_shards(self) -> int:
        """Into how many shards the rows of a batch are divided, which must divide their number:
        data * fsdp.
        """
        return 1 if self.mesh is None else self.mesh.shape[DATA] * self.mesh.shape[FSDP]

    @property
    def devices(self) -> int:
        """How many devices there are: the number of visuals in a batch must divide over them."""
        return 1 if self.mesh is None else self.mesh.size

    def active(self) -> Any:
        """Returns a context in which programs are traced and run for this mesh."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def by_row(self, arrays: Any) -> Any:
        """Puts a pytree of host arrays on the devices, their first axis over data and fsdp.

        Every process gives the whole arrays, and its devices take their parts.
        """
        return self._put(arrays, PartitionSpec(ROWS))

    def over_devices(self, arrays: Any) -> Any:
        """Puts a pytree of host arrays on the devices, their first axis over all of them."""
        return self._put(arrays, PartitionSpec(AXES))

    def whole(self, arrays: Any) -> Any:
        """Puts a pytree of host arrays on every device as a whole."""
        return self._put(arrays, PartitionSpec())

    def fetch(self, arrays: Any) -> Any:
        """Brings a pytree of device arrays to the host, whole on every process."""
        if self.mesh is None or not self.mesh.is_multi_process:
            return jax.device_get(arrays)
        return multihost_utils.process_allgather(arrays, tiled=True)

    def _put(self, arrays: Any, spec: PartitionSpec) -> Any:
        if self.mesh is None:
            return jax.device_put(arrays)
        sharding = NamedSharding(self.mesh, spec)

        def put(array: Any) -> jax.Array:
            host = np.asarray(array)
            return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)

        return jax.tree.map(put, arrays)
