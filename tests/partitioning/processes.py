"""The test's devices as if they were several processes': who has which, what each would read,
and the global arrays out of it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from flamingo_jax.experiment import MeshConfig
from flamingo_jax.partitioning.host_shard import HostShard
from flamingo_jax.partitioning.mesh import AXES, batch_shardings, make_mesh


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """As much of a device as a share asks for."""

    id: int
    process_index: int


class Processes(NamedTuple):
    """A mesh of real devices, the process that each of them is said to be of, and the share of
    each process.
    """

    mesh: Mesh
    process_of: dict[jax.Device, int]
    shares: list[HostShard]

    def assembled(self, batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The global arrays of which every process holds its batch.

        Fails where devices that hold the same would not, or something is missing.
        """
        found = {}
        for name, sharding in batch_shardings(batches[0], self.mesh).items():
            parts = [
                host_shard.parts(dict(batch))[name]
                for host_shard, batch in zip(self.shares, batches, strict=True)
            ]
            (shape,) = {part.shape(batch[name]) for part, batch in zip(parts, batches, strict=True)}
            whole, filled = np.zeros(shape, batches[0][name].dtype), np.zeros(shape[0], bool)
            for device, index in sharding.devices_indices_map(shape).items():
                process = self.process_of[device]
                cut = parts[process].cut(batches[process][name], index)
                assert cut.shape == whole[index].shape
                if filled[index[0]].any():
                    np.testing.assert_array_equal(whole[index], cut, err_msg=name)
                whole[index], filled[index[0]] = cut, True
            assert filled.all()
            found[name] = whole
        return found


def processes(shape: tuple[int, int, int], count: int, seed: int | None = None) -> Processes:
    """A mesh of eight devices shared by `count` processes: those that follow one another, or
    any, drawn with a seed.
    """
    mesh = make_mesh(MeshConfig(*shape))
    order = (
        np.arange(mesh.size) if seed is None else np.random.default_rng(seed).permutation(mesh.size)
    )
    owner = (order * count // mesh.size).reshape(mesh.devices.shape)
    fakes: Any = np.empty(mesh.devices.shape, object)
    for place, process in np.ndenumerate(owner):
        fakes[place] = FakeDevice(mesh.devices[place].id, int(process))
    fake = Mesh(fakes, AXES, axis_types=(AxisType.Auto,) * 3)
    process_of = {device: int(owner[place]) for place, device in np.ndenumerate(mesh.devices)}
    return Processes(mesh, process_of, [HostShard.of(fake, process) for process in range(count)])
