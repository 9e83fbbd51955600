"""Which rows of a global batch a process reads, and which visuals it decodes. This follows
from the mesh positions of its devices, never from the process index.

The rows of a batch are divided in order: row shard r of R = data * fsdp has the r-th block of
B / R rows. The visuals of these rows, row after row, are divided over `model`, padded with
blanks where they do not divide. So the global batch is the same on any number of processes.
Processes that share a `model` group read the same rows, and each decodes the visuals of its
own devices.
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
    """The parts of a global array that a process holds, of `total` equal parts of its first
    axis; `held` in ascending order.
    """

    held: tuple[int, ...]
    total: int

    def shape(self, local: np.ndarray) -> tuple[int, ...]:
        """Returns the shape of the global array from this process's parts, concatenated in
        `local`.

        Raises: ValueError where `local` is not that many equal parts.
        """
        if len(local) % len(self.held):
            raise ValueError(
                f"{len(local)} rows or visuals are no {len(self.held)} equal parts: an iterator"
                " must give what its share says"
            )
        return len(local) // len(self.held) * self.total, *local.shape[1:]

    def cut(self, local: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """Returns the part of a device, whose slices of the global array are `index`, as
        `jax.make_array_from_callback` asks for it.

        Raises: ValueError for a part that is not held.
        """
        size = len(local) // len(self.held)
        place = self.held.index((index[0].start or 0) // size)
        return local[place * size : (place + 1) * size]

    def numbers(self, size: int) -> np.ndarray:
        """Returns the global indices of the held parts' elements, each part of `size`: int
        [held * size].
        """
        return (np.array(self.held)[:, None] * size + np.arange(size)).reshape(-1)


@dataclasses.dataclass(frozen=True)
class HostShard:
    """The part of every global batch that a process reads; by default all of it.

    row_shards: into how many parts the mesh divides the rows, data * fsdp.
    model: into how many parts it divides the visuals of each row shard.
    devices: (row shard, index along `model`) of each of the process's devices, ascending.
    """

    row_shards: int = 1
    model: int = 1
    devices: tuple[tuple[int, int], ...] = ((0, 0),)

    @classmethod
    @functools.cache
    def of(cls, mesh: Mesh, process: int | None = None) -> "HostShard":
        """Computes the shard of a process, by default this one."""
        process = jax.process_index() if process is None else process
        _, fsdp, model = mesh.devices.shape
        # (row shard, index along `model`): ROWS = (data, fsdp) counts data outermost.
        held = (
            (d * fsdp + f, m)
            for (d, f, m), device in np.ndenumerate(mesh.devices)
            if device.process_index == process
        )
        return cls(mesh.devices.size // model, model, tuple(sorted(held)))

    @property
    def by_row(self) -> AxisParts:
        """Returns the process's parts of arrays with one entry per row."""
        return AxisParts(tuple(sorted({shard for shard, _ in self.devices})), self.row_shards)

    @property
    def by_visual(self) -> AxisParts:
        """Returns the process's parts of arrays with one entry per visual."""
        return AxisParts(
            tuple(shard * self.model + place for shard, place in self.devices),
            self.row_shards * self.model,
        )

    def rows(self, count: int) -> np.ndarray:
        """Returns the rows that the process reads, as indices into the global batch of `count`
        rows, a multiple of `row_shards`: int [B], ascending.
        """
        return self.by_row.numbers(count // self.row_shards)

    def row_visuals(self, rows: int, places: int) -> np.ndarray:
        """Returns all visuals of the rows that the process reads, whichever process decodes
        them, as row * places + place: int32 [B, N]. places: N, visuals per row.
        """
        return (self.rows(rows)[:, None] * places + np.arange(places)).astype(np.int32)

    def visuals(self, rows: int, places: int) -> np.ndarray:
        """Returns the visuals that the process decodes, of a global batch of `rows` rows with
        `places` visuals each, as row * places + place: int [M], -1 for blanks.
        """
        # Per row shard: visuals that rows have, and the length of the padded list.
        real, listed = (
            rows // self.row_shards * places,
            self.listed(rows, places) // self.row_shards,
        )
        # Place in the padded global list -> row shard and place within its part.
        shard, within = np.divmod(self.by_visual.numbers(listed // self.model), listed)
        return np.where(within < real, shard * real + within, -1)

    def listed(self, rows: int, places: int) -> int:
        """Returns the length of the global list of visuals, including blanks."""
        return (
            self.row_shards * self.model * math.ceil(rows // self.row_shards * places / self.model)
        )

    def parts(self, batch: dict[str, Any]) -> dict[str, AxisParts]:
        """Returns the process's parts of each array of a batch, as `mesh.batch_shardings`
        shards it.
        """
        return {
            name: self.by_visual if "visuals" in batch and name in BY_VISUAL else self.by_row
            for name in batch
        }


WHOLE_BATCH = HostShard()
"""The shard of a single process: everything."""
