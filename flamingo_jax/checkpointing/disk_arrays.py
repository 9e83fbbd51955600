"""Writes and reads the arrays of a checkpoint on a disk. This is the only file that imports
orbax.

    <folder>/trainable/   the parameters, whose names begin with "trainable/"
    <folder>/other/       moments, counts and everything else

Each is an OCDBT database of Zarr arrays. They are apart, so that an export reads and verifies
the parameters alone. Checkpoints of earlier versions have one database for both.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from flamingo_jax.checkpointing.stored_arrays import PARAMETERS, StoredArrays
from flamingo_jax.pytrees import stack_axes

OTHER = "other"
CHUNK_BYTES = 64 << 20
"""The largest chunk of a parameter, nearly: an array is read a chunk at a time."""
_DATABASE = "manifest.ocdbt"


class DiskArrays:
    """Saves and restores arrays by name."""

    def __init__(self) -> None:
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

    def save(self, folder: pathlib.Path, arrays: Mapping[str, jax.Array]) -> None:
        """Begins to save arrays; returns as soon as they may be overwritten or donated."""
        parts = _parts(arrays)
        self._orbax.save(
            folder,
            args=ocp.args.Composite(
                **{
                    part: ocp.args.StandardSave(
                        found,
                        {name: _save_args(name) for name in found} if part == PARAMETERS else None,
                    )
                    for part, found in parts.items()
                }
            ),
        )

    def wait_until_finished(self) -> None:
        """Waits until all processes have written their arrays."""
        self._orbax.wait_until_finished()

    def restore(
        self, folder: pathlib.Path, targets: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """Reads the arrays named in `targets` with the given dtypes and shardings.

        Raises: OSError or ValueError where the storage cannot be read.
        """
        if _is_one_database(folder):
            with ocp.StandardCheckpointer() as checkpointer:
                return checkpointer.restore(folder, dict(targets))
        wanted = {part: ocp.args.StandardRestore(found) for part, found in _parts(targets).items()}
        restored = self._orbax.restore(folder, args=ocp.args.Composite(**wanted))
        return {name: array for part in wanted for name, array in restored[part].items()}

    def open(self, folder: pathlib.Path) -> StoredArrays:
        """Opens the parameters for reading a piece at a time."""
        base = folder if _is_one_database(folder) else folder / PARAMETERS
        store = {"driver": "file", "path": f"{base}/"}
        return StoredArrays({"driver": "zarr"}, {"driver": "ocdbt", "base": store})

    def close(self) -> None:
        """Waits, then stops orbax's threads."""
        self._orbax.close()


def _is_one_database(folder: pathlib.Path) -> bool:
    return (folder / _DATABASE).exists()


def _parts(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Divides arrays by the part of the folder that holds them; empty parts are left out."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in arrays.items():
        part = PARAMETERS if name.startswith(f"{PARAMETERS}/") else OTHER
        parts.setdefault(part, {})[name] = value
    return parts


def _save_args(name: str) -> ocp.SaveArgs:
    """Makes chunks of a layer, or a part of one, each."""
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(range(stack_axes(name))))
