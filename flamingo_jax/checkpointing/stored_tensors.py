"""Locates tensors in safetensors files, and describes how they are combined into parameters.

Reads only the headers of the files; `tensors` reads the tensors themselves.
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
"""dtypes of parameters by their name in a safetensors header."""
PIECE = 16 * 2**20
"""Bytes that each thread reads at a time."""
MOST_HEADER_BYTES = 100_000_000
"""The largest header that is accepted; the safetensors library has the same limit."""


class StoredTensor(NamedTuple):
    """Locates a tensor in a file. dtype: its name in the header, a key of `DTYPES`. start: the
    offset of its first byte in the file.
    """

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        """Returns the size of the tensor in the file."""
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


class Term(NamedTuple):
    """Describes how a stored tensor becomes one layer of a parameter. A parameter is the sum
    of its terms.

    form: the axes of the tensor and of the parameter as in einops, "(h d) w -> w h d"; axes in
      brackets are flattened into one, row-major. "" if the tensor has the parameter's layout.
    sizes: the sizes of axes that cannot be inferred from the parameter's shape, such as axes
      in brackets on the right.
    first, taken: the rows to read, `taken` rows from row `first` on; by default all.
    pick: {axis: index} of axes in brackets of which only one index is read, for example where
      queries, keys and values are stored interleaved. Not for the tensor's first axis.
    """

    name: str
    form: str = ""
    sizes: Mapping[str, int] = {}
    first: int = 0
    taken: int | None = None
    pick: Mapping[str, int] = {}


class TensorLayout(NamedTuple):
    """Holds the form of a term, worked out for one shape of the parameter.

    stored: shape of the rows that are read from the tensor. split: the same rows with the axes
    in brackets split. picked: index into `split` that applies `pick`. order: permutation of
    the remaining axes into the parameter's order. merged: whether some of them are flattened
    into one axis of the parameter.
    """

    stored: tuple[int, ...]
    split: tuple[int, ...]
    pick_index: tuple[slice | int, ...]
    order: tuple[int, ...]
    merged: bool

    @property
    def moved_axes(self) -> int | None:
        """Returns n if the parameter is the tensor with its first n axes moved to the end,
        which is a matrix transpose after reshaping (0: no change); None for any other
        permutation.
        """
        count = len(self.order)
        moved_axes = self.order[0] if count else 0
        return (
            moved_axes
            if not self.merged
            and self.order == tuple((moved_axes + place) % count for place in range(count))
            else None
        )

    def pick(self, array: np.ndarray) -> np.ndarray:
        """Applies `pick` to an array of shape `split`."""
        return array[self.pick_index] if self.pick_index else array


def read_headers(files: Iterable[pathlib.Path]) -> dict[str, StoredTensor]:
    """Locates every tensor of some safetensors files by name; reads only their headers.

    Raises: UserError for a file that is missing, truncated or not safetensors, StorageError
      for one that cannot be read at the moment.
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
            # The file is: 8 bytes with the size of the header, the header, the tensors.
            # Offsets in the header are relative to the end of the header.
            found[name] = StoredTensor(
                file, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
            )
    return found


def _read_header(file: pathlib.Path) -> tuple[int, dict[str, Any]]:
    """Reads (bytes of the header, header) of a file on a disk.

    The library validates the header, but does not give the offsets of tensors. It could read
    the tensors too, but maps the complete file, which then counts as memory of this process.
    """
    manifest.require_readable(file)
    with safetensors.safe_open(file, framework="numpy"):
        pass
    with open(file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return size, json.loads(stream.read(size))


def _read_bucket_header(file: pathlib.Path) -> tuple[int, dict[str, Any]]:
    """Reads (bytes of the header, header) of a file in a bucket, which the library cannot
    open.
    Raises ValueError for a tensor that is not inside the file.
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
    """Works out the layout of a term for a parameter (or one layer of it) of this shape."""
    if not term.form:
        return TensorLayout(shape, shape, (), tuple(range(len(shape))), False)
    # "(h d) w -> w h d" gives left [[h, d], [w]] and right [[w], [h], [d]].
    left, right = (list(_axes(side)) for side in term.form.split("->"))
    sizes = dict(term.sizes)
    # Infer the sizes of axes from the parameter's shape; within brackets all but one are
    # known.
    for axes, size in zip(right, shape, strict=True):
        for axis in axes:
            sizes.setdefault(
                axis, size // math.prod(sizes[other] for other in axes if other in sizes)
            )
    # The tensor's axes with brackets split, and the ones that remain after `pick`.
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
    """Reads one small tensor in its stored dtype. Raises OSError."""
    read = paths.read_into(tensor.file, tensor.start, np.empty(tensor.bytes, np.uint8))
    return read.view(DTYPES[tensor.dtype]).reshape(tensor.shape)


def same_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    """Compares two tensors bit for bit, reading a piece of each at a time.

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
