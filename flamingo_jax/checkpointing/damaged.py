"""Marks checkpoints that differ from their manifest: on a disk the folder of a damaged step is
renamed, in a bucket its manifest.
"""

import os
import pathlib
import re

from flamingo_jax import paths
from flamingo_jax.checkpointing import manifest

DAMAGED = manifest.NAME + ".damaged"
"""The manifest of a damaged step in a bucket."""
_RENAMED = re.compile(r"([0-9]{1,18})\.damaged(\.[0-9]+)?")


def is_damaged(path: pathlib.Path) -> bool:
    """Returns whether the folder of a step in a bucket is marked. Raises OSError."""
    return manifest.is_there(path / DAMAGED)


def mark_damaged(path: pathlib.Path) -> pathlib.Path:
    """Marks the folder of a step; returns where what is left of it is now. Raises OSError."""
    if paths.is_bucket(path):
        (path / DAMAGED).write_bytes((path / manifest.NAME).read_bytes())
        (path / manifest.NAME).unlink()
        return path / DAMAGED
    number, target = 1, path.with_name(f"{path.name}.damaged")
    while target.exists():
        number, target = number + 1, path.with_name(f"{path.name}.damaged.{number + 1}")
    path.rename(target)
    return target


def damaged_steps(folder: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """Lists the marked steps in a folder of checkpoints, each with where it is now. Raises
    OSError.
    """
    if paths.is_bucket(folder):
        names = paths.subfolders(folder) if manifest.is_there(folder) else []
        steps = [int(name) for name in names if name.isdecimal() and is_damaged(folder / name)]
        return [(step, folder / str(step) / DAMAGED) for step in steps]
    names = os.listdir(folder) if manifest.is_there(folder) else []
    found = [(_RENAMED.fullmatch(name), folder / name) for name in names]
    return [(int(match[1]), path) for match, path in found if match]
