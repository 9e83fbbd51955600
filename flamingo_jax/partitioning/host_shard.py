"""What a process reads of every global batch follows from the devices that it holds in the
mesh, never from its number.

Rows stand in a batch in their order: row shard r of R = data * fsdp has the r-th R-th of them,
and its visuals, row after row, are divided over `model`, filled up with blanks where they do
not divide. So a batch is the same on any number of processes. Processes that hold parts of one
`model` group read the same rows, and each decodes the visuals of its own devices.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from flamingo_jax.partitioning.mesh import BY_VISUAL


class AxisParts(NamedTuple):
    """Tells which of the `total` equal parts of an array's first axis a process holds, in ascending
    order.
    """

    held: tuple[int, ...]
    total: int

    def shape(self, local: np.ndarray) -> tuple[int, ...]:
        """Returns the shape of the global array, of which `local` has the parts held, one
        after the other.

        Raises ValueError where it cannot have.
        """
        if len(local) % len(self.held):
            raise ValueError(
                f"{len(local)} rows or visuals are no {len(self.held)} equal parts: an iterator"
                " must give what its share says"
            )
        return len(local) // len(self.held) * self.total, *local.shape[1:]

    def cut(self, local: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """Returns what a device has of the global array, its slices being `index`.

        Raises ValueError for a part that is not held.
        """
        size = len(local) // len(self.held)
        place = self.held.index((index[0].start or 0) // size)
        return local[place * size : (place + 1) * size]

    def numbers(self, size: int) -> np.ndarray:
        """Returns the places of the parts held, each of `size`, in the global array: int [held
        * size].
        """
        return (np.array(self.held)[:, None] * size + np.arange(size)).reshape(-1)


@dataclasses.dataclass(frozen=True)
class HostShard:
    """Tells which part of every global batch a process reads; by default all of it.

    row_shards, model: into how many parts the mesh divides rows, and then the visuals of each.
    devices: (row shard, place along `model`) of each of the process's devices, ascending.
    """

    row_shards: int = 1
    model: int = 1
    devices: tuple[tuple[int, int], ...] = ((0, 0),)

    @classmethod
    @functools.cache
    def of(cls, mesh: Mesh, process: int | None = None) -> "HostShard":
        """Returns that of a process, by default this one."""
        process = jax.process_index() if process is None else process
        _, fsdp, model = mesh.devices.shape
        held = (
            (d * fsdp + f, m)
            for (d, f, m), device in np.ndenumerate(mesh.devices)
            if device.process_index == process
        )
        return cls(mesh.devices.size // model, model, tuple(sorted(held)))

    @property
    def by_row(self) -> AxisParts:
        """Returns the parts of arrays with one entry a row."""
        return AxisParts(tuple(sorted({shard for shard, _ in self.devices})), self.row_shards)

    @property
    def by_visual(self) -> AxisParts:
        """Returns the parts of arrays with one entry a visual."""
        return AxisParts(
            tuple(shard * self.model + place for shard, place in self.devices),
            self.row_shards * self.model,
        )

    def rows(self, count: int) -> np.ndarray:
        """Returns the rows that the process reads, as places in the global batch of `count`, a
        multiple of `row_shards`: int [B], ascending.
        """
        return self.by_row.numbers(count // self.row_shards)

    def row_visuals(self, rows: int, places: int) -> np.ndarray:
        """Returns all visuals of the rows that the process reads, whoever decodes them, as row
        * places + place: int32 [B, N].
        """
        return (self.rows(rows)[:, None] * places + np.arange(places)).astype(np.int32)

    def visuals(self, rows: int, places: int) -> np.ndarray:
        """Returns the visuals that the process decodes in a global batch of `rows` with
        `places` each, as row * places + place: int [M], -1 for blanks.
        """
        real, listed = (
            rows // self.row_shards * places,
            self.listed(rows, places) // self.row_shards,
        )
        shard, within = np.divmod(self.by_visual.numbers(listed // self.model), listed)
        return np.where(within < real, shard * real + within, -1)

    def listed(self, rows: int, places: int) -> int:
        """Returns the length of the global list of visuals, with its blanks."""
        return (
            self.row_shards * self.model * math.ceil(rows // self.row_shards * places / self.model)
        )

    def parts(self, batch: dict[str, Any]) -> dict[str, AxisParts]:
        """Returns the parts of each of a batch's arrays, by the rule of `mesh.batch_shardings`."""
        return {
            name: self.by_visual if "visuals" in batch and name in BY_VISUAL else self.by_row
            for name in batch
        }


WHOLE_BATCH = HostShard()
