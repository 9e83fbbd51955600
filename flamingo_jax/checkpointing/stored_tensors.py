"""Tensors in safetensors files: where each lies, and what a parameter is made of.

No file is read but its header: pieces of tensors are read by `tensors`.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from flamingo_jax import paths
from flamingo_jax.checkpointing import manifest
from flamingo_jax.errors import UserError

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
"""The types that parameters come in, by their names in a safetensors header."""
PIECE = 16 * 2**20
"""Bytes that are read at a time, by each thread."""
MOST_HEADER_BYTES = 100_000_000
"""Of a safetensors file, as the library itself has it."""


class StoredTensor(NamedTuple):
    """Tells where a tensor lies. dtype: as the file's header names it. start: the place of its
    first byte.
    """

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


class Term(NamedTuple):
    """Names a stored tensor and how it becomes one layer of a parameter, which is the sum of its
    terms.

    form: the tensor's axes and the parameter's, "(h d) w -> w h d"; those in brackets are one
      axis, the first of them the slowest. "" for the same.
    sizes: of axes that the parameter's shape does not tell, as those in brackets on the right.
    first, taken: its rows, so many from `first` on; by default all.
    pick: axes of the tensor, of the names in brackets, of which only this place is taken, as
      where queries, keys and values lie together: not the first of all.
    """

    name: str
    form: str = ""
    sizes: Mapping[str, int] = {}
    first: int = 0
    taken: int | None = None
    pick: Mapping[str, int] = {}


class TensorLayout(NamedTuple):
    """Tells what a term's form means for one shape of a parameter.

    stored: the shape of the tensor's rows that are taken. split: the same with the brackets
    opened. picked: the index of `split` that leaves the axes which the parameter has. order:
    these in the parameter's order. merged: some of these are one axis of the parameter.
    """

    stored: tuple[int, ...]
    split: tuple[int, ...]
    picked: tuple[slice | int, ...]
    order: tuple[int, ...]
    merged: bool

    @property
    def turn(self) -> int | None:
        """Tells how many of the first axes stand behind the others in the parameter, which is
        then a transposed matrix (0: the same); else None.
        """
        count = len(self.order)
        turn = self.order[0] if count else 0
        return (
            turn
            if not self.merged
            and self.order == tuple((turn + place) % count for place in range(count))
            else None
        )

    def pick(self, array: np.ndarray) -> np.ndarray:
        """Takes of an array like `split` what the parameter has."""
        return array[self.picked] if self.picked else array


def read_headers(files: Iterable[pathlib.Path]) -> dict[str, StoredTensor]:
    """Finds every tensor of some safetensors files, by name; no tensor is read.

    Raises: UserError for a file that is missing, cut short or foreign, StorageError for one
    that cannot be read just now.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            size, header = (
                _read_bucket_header(file) if paths.is_bucket(file) else _read_header(file)
            )
        except (FileNotFoundError, ValueError, EOFError, safetensors.SafetensorError) as error:
            raise UserError(
                f"{file} is no whole safetensors file ({error}): copy it again"
            ) from error
        except OSError as error:
            raise manifest.unreadable(file, error) from error
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in found:
                raise UserError(
                    f"{name} is both in {found[name].file} and in {file}: remove the one that"
                    " does not belong there"
                )
            found[name] = StoredTensor(
                file, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
            )
    return found


def _read_header(file: pathlib.Path) -> tuple[int, dict[str, Any]]:
    """Reads (bytes of the header, header) of a file on a disk.

    The library checks the header against the file, but does not tell where a tensor lies; its
    own reading maps whole files into memory, which then count as the process's.
    """
    manifest.require_readable(file)
    with safetensors.safe_open(file, framework="numpy"):
        pass
    with open(file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return size, json.loads(stream.read(size))


def _read_bucket_header(file: pathlib.Path) -> tuple[int, dict[str, Any]]:
    """Reads (bytes of the header, header) of a file in a bucket, where the library cannot read,
    and checks that each tensor lies within the file. Raises ValueError for one that does not.
    """
    total = manifest.retry_read(lambda: paths.version(file)).bytes
    size = int.from_bytes(_read_bytes(file, 0, 8), "little")
    if size > min(total - 8, MOST_HEADER_BYTES):
        raise ValueError("its header is cut short")
    header = json.loads(_read_bytes(file, 8, size))
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        first, last = tensor["data_offsets"]
        bytes_of = math.prod(tensor["shape"]) * np.dtype(DTYPES[tensor["dtype"]]).itemsize
        if not 0 <= first <= last <= total - 8 - size or last - first != bytes_of:
            raise ValueError(f"{name} does not lie within it")
    return size, header


def _read_bytes(file: pathlib.Path, start: int, count: int) -> bytes:
    memory = np.empty(count, np.uint8)
    return manifest.retry_read(lambda: paths.read_into(file, start, memory)).tobytes()


def layout(term: Term, shape: tuple[int, ...]) -> TensorLayout:
    """Works out how a stored tensor becomes a parameter of this shape, or one layer of it."""
    if not term.form:
        return TensorLayout(shape, shape, (), tuple(range(len(shape))), False)
    left, right = (list(_axes(side)) for side in term.form.split("->"))
    sizes = dict(term.sizes)
    for axes, size in zip(right, shape, strict=True):
        for axis in axes:
            sizes.setdefault(
                axis, size // math.prod(sizes[other] for other in axes if other in sizes)
            )
    names = [axis for axes in left for axis in axes]
    kept = [axis for axis in names if axis not in term.pick]
    order = tuple(kept.index(axis) for axes in right for axis in axes)
    stored = tuple(math.prod(sizes[axis] for axis in axes) for axes in left)
    return TensorLayout(
        stored,
        tuple(sizes[axis] for axis in names),
        tuple(term.pick.get(axis, slice(None)) for axis in names) if term.pick else (),
        order,
        any(len(axes) > 1 for axes in right),
    )


def _axes(side: str) -> Iterator[list[str]]:
    """Parses "(h d) w" to ["h", "d"], ["w"]."""
    while side := side.strip():
        part, _, side = side[1:].partition(")") if side[0] == "(" else side.partition(" ")
        yield part.split()


def read_whole(tensor: StoredTensor) -> np.ndarray:
    """Reads one tensor in its stored type, for small ones. Raises OSError."""
    read = paths.read_into(tensor.file, tensor.start, np.empty(tensor.bytes, np.uint8))
    return read.view(DTYPES[tensor.dtype]).reshape(tensor.shape)


def same_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    """Tells whether two tensors are equal to the bit; reads a piece of each at a time.

    Raises OSError.
    """
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    memory = np.empty((2, min(PIECE, first.bytes)), np.uint8)
    for start in range(0, first.bytes, PIECE):
        size = min(PIECE, first.bytes - start)
        one, other = (
            paths.read_into(tensor.file, tensor.start + start, part[:size])
            for tensor, part in zip((first, second), memory, strict=True)
        )
        if not np.array_equal(one, other):
            return False
    return True
