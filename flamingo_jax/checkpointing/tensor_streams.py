"""Describes parameters in safetensors files for reading one layer at a time, as an export does
that is written from them.
"""

import contextlib
import functools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flamingo_jax.checkpointing import manifest
from flamingo_jax.checkpointing.stored_tensors import DTYPES, PIECE, StoredTensor, Term, layout
from flamingo_jax.checkpointing.streaming import HashingReader, StreamedTensor
from flamingo_jax.checkpointing.tensors import HostBuffer, cast_into, layer_pieces
from flamingo_jax.errors import UserError
from flamingo_jax.pytrees import stacked_name


def stream_tensors(
    stored: Mapping[str, StoredTensor],
    sources: Mapping[str, Sequence[Term]],
    targets: Mapping[str, jax.ShapeDtypeStruct],
) -> list[StreamedTensor]:
    """Describes the arrays in `targets` for reading one layer at a time, cast to the targets'
    dtypes, in the order of the files. Arguments as in `read_sharded`.

    Tensors that have the parameter's layout are read in pieces; others are held completely.
    """
    found: list[StreamedTensor] = []

    def place(leaf: str) -> tuple[pathlib.Path, int, str]:
        tensor = stored[sources[leaf][0].name]
        return tensor.file, tensor.start, leaf

    for leaf in sorted(sources, key=place):
        name, index = stacked_name(leaf)
        if name not in targets:
            continue
        terms, target = sources[leaf], targets[name]
        shape, dtype = tuple(target.shape[len(index) :]), np.dtype(target.dtype)
        tensor = stored[terms[0].name]
        if len(terms) == 1 and not terms[0].form and tensor.shape == shape:
            pieces: Any = functools.partial(_read_pieces, tensor, dtype)
            held = min(PIECE, tensor.bytes) * (1 + (np.dtype(DTYPES[tensor.dtype]) != dtype) * 2)
        else:
            pieces = functools.partial(_read_complete, stored, terms, shape, dtype)
            # Sums and merged axes are read completely before they are combined.
            at_once = sum(stored[term.name].bytes for term in terms)
            simple = len(terms) == 1 and not layout(terms[0], shape).merged
            held = math.prod(shape) * dtype.itemsize + (PIECE if simple else 2 * at_once)
        found.append(StreamedTensor(leaf, dtype, shape, pieces, held))
    return found


def _read_pieces(
    tensor: StoredTensor, dtype: np.dtype, reader: HashingReader
) -> Iterator[np.ndarray]:
    """Yields the values of a stored tensor, some MiB at a time."""
    for start in range(0, tensor.bytes, PIECE):
        memory = np.empty(min(PIECE, tensor.bytes - start), np.uint8)
        with _failures(tensor.file):
            reader.read_into(tensor.file, tensor.start + start, memory)
        values = memory.view(DTYPES[tensor.dtype])
        if values.dtype != dtype:
            values, read = np.empty(values.shape, dtype), values
            cast_into(values, read)
            del read
        del memory
        yield values


def _read_complete(
    stored: Mapping[str, StoredTensor],
    terms: Sequence[Term],
    shape: tuple[int, ...],
    dtype: np.dtype,
    reader: HashingReader,
) -> Iterator[np.ndarray]:
    """Yields a layer of a parameter that is made of other layouts or of several tensors."""
    shard = HostBuffer(dtype, (), tuple(slice(0, size) for size in shape), [])
    for piece in layer_pieces(stored, terms, (), shape, [shard]):
        memory = np.empty(piece.bytes, np.uint8)
        with _failures(piece.file):
            piece.put(reader.read_into(piece.file, piece.start, memory))
    yield shard.buffer


@contextlib.contextmanager
def _failures(file: pathlib.Path) -> Iterator[None]:
    """Turns what reading a file raises into a UserError or a StorageError."""
    try:
        yield
    except EOFError as error:
        raise UserError(f"{error}: copy it again") from error
    except OSError as error:
        raise manifest.unreadable(file, error) from error
