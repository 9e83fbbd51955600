"""Reads arrays of a checkpoint with tensorstore, a piece of a layer at a time."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from flamingo_jax.checkpointing.streaming import HashingReader, StreamedTensor
from flamingo_jax.pytrees import leaf_name, stack_axes

PARAMETERS = "trainable"
"""The beginning of the names of a state's parameters, and the folder that holds them."""
PIECE = 64 << 20
"""Bytes that are read at a time, or a chunk if that is larger."""


class StoredArrays:
    """Opens arrays by name.

    Args:
      spec: of tensorstore, without its kvstore. store: the kvstore that holds all arrays.
      settings: of tensorstore's context, such as retries.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        store: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
    ):
        self._spec, self._store, self._settings = spec, store, settings or {}

    def stream(
        self, targets: Mapping[str, jax.ShapeDtypeStruct], prefix: str = ""
    ) -> list[StreamedTensor]:
        """Describes the arrays `prefix` + name for reading one layer at a time, as tensors of
        the names in `targets`, cast to the targets' dtypes.

        An array whose chunks hold several layers is decoded a chunk at a time, and that many
        bytes stay in memory. Raises: ValueError where the storage cannot be read.
        """
        stores = {name: self._open(prefix + name, 0) for name in targets}
        found: list[StreamedTensor] = []
        for name, target in targets.items():
            axes = stack_axes(name)
            store = stores[name]
            size = store.dtype.numpy_dtype.itemsize
            chunk = tuple(size or 1 for size in store.chunk_layout.read_chunk.shape or ())
            layers = math.prod(chunk[:axes])
            if layers > 1:
                # All chunks that a layer is in, so that each is decoded once for its layers.
                kept = layers * math.prod(store.shape[axes:]) * size
                store = self._open(prefix + name, 2 * kept)
            rows, held = _rows(store.shape[axes:], chunk[axes:], size)
            for index in np.ndindex(*store.shape[:axes]):
                found.append(
                    StreamedTensor(
                        leaf_name(name, index),
                        np.dtype(target.dtype),
                        tuple(store.shape[axes:]),
                        _Pieces(store, index, rows, np.dtype(target.dtype)),
                        held,
                    )
                )
        return found

    def _open(self, name: str, cache: int) -> ts.TensorStore:
        context = ts.Context({**self._settings, "cache_pool": {"total_bytes_limit": cache}})
        path = f"{self._store.get('path', '')}{name}/"
        spec = {**self._spec, "kvstore": {**self._store, "path": path}}
        return ts.open(spec, open=True, read=True, context=context).result()


class _Pieces:
    """Reads one layer of an array: the `pieces` of a `StreamedTensor`."""

    def __init__(self, store: ts.TensorStore, index: tuple[int, ...], rows: int, dtype: np.dtype):
        self._store, self._index, self._rows, self._dtype = store, index, rows, dtype

    def __call__(self, reader: HashingReader) -> Iterator[np.ndarray]:
        layer = self._store[self._index] if self._index else self._store
        if not layer.shape:
            yield np.asarray(layer.read().result(), self._dtype, order="C")
            return
        for start in range(0, layer.shape[0], self._rows):
            part = layer[start : min(start + self._rows, layer.shape[0])]
            yield np.asarray(part.read().result(), self._dtype, order="C")


def _rows(shape: tuple[int, ...], chunk: tuple[int, ...], size: int) -> tuple[int, int]:
    """Returns how many rows of an array of this shape are read at a time, whole chunks, and
    the bytes that this holds: the values, and the chunks that they are decoded from.
    """
    if not shape:
        return 1, size
    row = math.prod(shape[1:]) * size
    least = chunk[0] or 1
    rows = least * max(1, PIECE // max(1, least * row))
    return rows, 2 * min(rows, shape[0]) * row
