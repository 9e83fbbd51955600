"""Reads safetensors files straight into sharded arrays: each process reads the bytes that its
own devices hold, a piece at a time.

A complete parameter is never in the host memory of an accelerator: pieces of some MiB are
read, sent to the device and copied into a buffer there. On CPU the buffers are the arrays
themselves, filled in place.
"""

import concurrent.futures
import functools
import math
import operator
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flamingo_jax import paths
from flamingo_jax.checkpointing import manifest
from flamingo_jax.checkpointing.stored_tensors import (
    DTYPES,
    PIECE,
    StoredTensor,
    TensorLayout,
    Term,
    layout,
)
from flamingo_jax.distributed.process_group import ProcessGroup, SingleProcess
from flamingo_jax.errors import UserError
from flamingo_jax.progress import Bar
from flamingo_jax.pytrees import STACK, stacked_name

Slices = tuple[slice, ...]

THREADS = max(2, min(8, os.cpu_count() or 1))
TILE = (512, 256)
"""Rows and columns that are transposed at a time: a tile fits into a core's cache, and gives
at least a KiB of each row that is written.
"""
SHORT = 2**28
"""Below this number of bytes no progress bar is shown, since reading is over at once."""
ALIGNMENT = 64
"""Alignment of host memory in bytes, which lets it become a jax.Array on CPU without a
copy.
"""


def read_sharded(
    stored: Mapping[str, StoredTensor],
    sources: Mapping[str, Sequence[Term]],
    targets: Mapping[str, jax.ShapeDtypeStruct],
    title: str = "reading",
    process_group: ProcessGroup | None = None,
    layers: range | None = None,
) -> dict[str, jax.Array]:
    """Reads the arrays in `targets` with their dtypes and shardings.

    An array that is replicated over several processes is not read by each of them: they divide
    its layers, or the rows of its tensors, and then all-gather it on the devices.

    Args:
      stored: {name: tensor in a file} for every term, in the shape that `layout` gives.
      sources: {per-layer name of a parameter, "layers/12/attention/query": its terms}.
      targets: {stacked name: shape, dtype and sharding}; an array without a sharding is put on
        the first local device.
      title: shown beside the progress bar; "" for no bar.
      process_group: the processes of the run; by default a `SingleProcess`.
      layers: only these layers of the stacks, whose targets then have as many; by default all.

    Raises: UserError when a file cannot be read any more.
    """
    sources = sources if layers is None else _only_layers(sources, layers)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {name: target.sharding or here for name, target in targets.items()}
    shardings = {
        name: _spread(wanted[stacked_name(leaf)[0]], targets[name], terms, len(index))
        for leaf, terms in sources.items()
        for name, index in [stacked_name(leaf)]
        if name in targets
    }
    shards: dict[str, list[_Shard]] = {}
    pieces: list[_Piece] = []
    for leaf, terms in sources.items():
        name, index = stacked_name(leaf)
        if name in targets:
            target = targets[name]
            if name not in shards:
                shards[name] = _shards(target, shardings[name], len(index))
            pieces += layer_pieces(stored, terms, index, target.shape[len(index) :], shards[name])
    _run(pieces, title)
    # The all-gathers below have time limits, so all processes finish reading before them.
    if any(shardings[name] != wanted[name] for name in targets):
        (process_group or SingleProcess()).barrier(f"the end of {title}")
    found: dict[str, jax.Array] = {}
    for name, target in targets.items():
        arrays = [array for shard in shards.pop(name) for array in shard.arrays()]
        found[name] = jax.make_array_from_single_device_arrays(
            target.shape, shardings[name], arrays
        )
        if shardings[name] != wanted[name]:
            # One at a time, so that only one array is in memory twice.
            found[name] = jax.block_until_ready(_moved(wanted[name])(found[name]))
    return found


def _only_layers(sources: Mapping[str, Sequence[Term]], layers: range) -> dict[str, Sequence[Term]]:
    """Returns the sources of some layers of the stacks, renumbered from 0 on."""
    found = {}
    for leaf, terms in sources.items():
        name, index = stacked_name(leaf)
        if len(index) == 1 and index[0] in layers:
            first, _, last = name.partition(f"{STACK}/")
            found[f"{first}{STACK}/{layers.index(index[0])}/{last}"] = terms
    return found


@functools.cache
def _moved(sharding: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=sharding)


def _spread(
    sharding: jax.sharding.Sharding,
    target: jax.ShapeDtypeStruct,
    terms: Sequence[Term],
    lead: int,
) -> jax.sharding.Sharding:
    """Chooses the sharding in which a parameter is read: the target sharding, with mesh axes
    that it does not use added to the layer axes or to the rows of the tensors. So each process
    reads a part, and the devices all-gather the rest. Columns are not split: a read takes
    complete rows.

    lead: number of leading layer axes of the parameter.
    """
    if sharding.is_fully_addressable or not isinstance(sharding, NamedSharding):
        return sharding
    mesh, shape = sharding.mesh, target.shape
    order = layout(terms[0], shape[lead:]).order
    if len(shape) != lead + len(order):
        return sharding
    spec = [
        () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        for axes in sharding.spec
    ]
    spec += [()] * (len(shape) - len(spec))
    # Mesh axes over which the parameter would be replicated, the largest first.
    free = [axis for axis in mesh.shape if not any(axis in axes for axes in spec)]
    for axis in sorted(free, key=lambda axis: -mesh.shape[axis]):
        for place in (*range(lead), *([lead + order.index(0)] if order else [])):
            if shape[place] % math.prod(mesh.shape[name] for name in (*spec[place], axis)) == 0:
                spec[place] = (*spec[place], axis)
                break
    return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in spec)))


class HostBuffer:
    """Collects one shard of an array on the CPU: memory that is filled in place and then
    becomes a jax.Array without a copy.

    layers: the slices of the leading layer axes that the shard holds. slices: those of the
    other axes.
    """

    def __init__(
        self, dtype: np.dtype, layers: Slices, slices: Slices, devices: Sequence[jax.Device]
    ):
        self.layers, self.slices, self._devices = layers, slices, devices
        shape = tuple(part.stop - part.start for part in (*layers, *slices))
        size = math.prod(shape) * dtype.itemsize
        memory = np.empty(size + ALIGNMENT, np.uint8)
        # numpy does not align memory, so take an aligned part of a larger buffer.
        first = -memory.ctypes.data % ALIGNMENT
        self.buffer = memory[first : first + size].view(dtype).reshape(shape)

    def put(
        self,
        layer: tuple[int, ...],
        places: Slices,
        rows: np.ndarray,
        order: tuple[int, ...],
        moved_axes: int | None,
    ) -> None:
        """Writes `rows`, transposed by `order`, into the slices `places` of a layer. turn: see
        `TensorLayout`.
        """
        index: Any = (*layer, *places, ...)
        target = self.buffer[index]
        if moved_axes:
            matrix = rows.reshape(math.prod(rows.shape[:moved_axes]), -1)
            flat = target.reshape(matrix.shape[::-1])
            if np.may_share_memory(flat, target):
                _transpose(flat, matrix)
                return
        cast_into(target, rows.transpose(order))

    def arrays(self) -> list[jax.Array]:
        """Returns the buffer as one array per device, without a copy where JAX allows it."""
        return [jax.device_put(self.buffer, device, may_alias=True) for device in self._devices]


class DeviceBuffer:
    """Collects one shard of an array on accelerators: pieces are sent to a buffer on the
    device and transposed and cast there. Arguments as in `HostBuffer`.
    """

    def __init__(
        self, dtype: np.dtype, layers: Slices, slices: Slices, devices: Sequence[jax.Device]
    ):
        self.layers, self.slices, self._devices = layers, slices, devices
        shape = tuple(part.stop - part.start for part in (*layers, *slices))
        self._buffers = [jnp.zeros(shape, dtype, device=device) for device in devices]
        self._lock = threading.Lock()

    def put(
        self,
        layer: tuple[int, ...],
        places: Slices,
        rows: np.ndarray,
        order: tuple[int, ...],
        moved_axes: int | None,
    ) -> None:
        """Sends `rows` to the devices and writes them there; arguments as in
        `HostBuffer.put`.
        """
        starts = np.array([*layer, *(part.start or 0 for part in places)], np.int32)
        rows = np.ascontiguousarray(rows)
        sent = [jax.device_put(rows, device, may_alias=False) for device in self._devices]
        with self._lock:
            self._buffers = [
                _lay(buffer, piece, starts, order)
                for buffer, piece in zip(self._buffers, sent, strict=True)
            ]
        # The caller reads the next piece into the memory of `rows`, so wait for the transfer.
        jax.block_until_ready(sent)

    def arrays(self) -> list[jax.Array]:
        """Returns the buffers, one array per device."""
        return self._buffers


_Shard = HostBuffer | DeviceBuffer


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _lay(
    buffer: jax.Array, rows: jax.Array, starts: jax.Array, order: tuple[int, ...]
) -> jax.Array:
    piece = rows.transpose(order).astype(buffer.dtype)
    return jax.lax.dynamic_update_slice(
        buffer, piece.reshape((1,) * (buffer.ndim - piece.ndim) + piece.shape), tuple(starts)
    )


def _shards(
    target: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding, lead: int
) -> list[_Shard]:
    """Makes a buffer for each shard of the array on the devices of this process."""
    # Devices with the same slice of the array share one buffer on CPU.
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(target.shape).items():
        bounds = tuple(
            part.indices(size)[:2] for part, size in zip(index or (), target.shape, strict=True)
        )
        holders.setdefault(bounds, []).append(device)
    found: list[_Shard] = []
    for bounds, devices in holders.items():
        slices = tuple(slice(*pair) for pair in bounds)
        kind = HostBuffer if devices[0].platform == "cpu" else DeviceBuffer
        found.append(kind(np.dtype(target.dtype), slices[:lead], slices[lead:], devices))
    return found


class _Piece(NamedTuple):
    """Describes a read of `bytes` bytes at offset `start`, and the function that takes the
    data.
    """

    file: pathlib.Path
    start: int
    bytes: int
    put: Callable[[np.ndarray], None]


def layer_pieces(
    stored: Mapping[str, StoredTensor],
    terms: Sequence[Term],
    layer: tuple[int, ...],
    shape: tuple[int, ...],
    shards: Sequence[_Shard],
) -> Iterator[_Piece]:
    """Yields the reads that fill one layer of a parameter in the shards that hold a part of
    it.
    """
    shards = [
        s
        for s in shards
        if all(part.start <= place < part.stop for part, place in zip(s.layers, layer, strict=True))
    ]
    # Only a single term without merged axes can be read in pieces of rows; other parameters
    # are small and are read completely.
    form = layout(terms[0], shape)
    simple = len(terms) == 1 and not form.merged and form.split
    if not shards:
        return
    if not simple:
        yield _sum(stored, terms, layer, shape, shards)
        return
    tensor, order = stored[terms[0].name], form.order
    dtype = np.dtype(DTYPES[tensor.dtype])
    # Bytes of a row, and the offset of the first row of this term in the file.
    row = math.prod(form.split[1:]) * dtype.itemsize
    start = tensor.start + math.prod(tensor.shape[1:]) * dtype.itemsize * terms[0].first
    # Rows of the tensor are sliced as the parameter's axis that they become.
    wanted = [shard.slices[order.index(0)] for shard in shards]
    first, last = min(part.start for part in wanted), max(part.stop for part in wanted)
    step = max(1, PIECE // max(row, 1))
    # Pieces of complete tiles are transposed fastest.
    step -= step % TILE[0] if step > TILE[0] else 0
    for begin in range(first, last, step):
        end = min(begin + step, last)
        put = functools.partial(_distribute, shards, layer, form, (begin, end), dtype)
        yield _Piece(tensor.file, start + begin * row, (end - begin) * row, put)


def _distribute(
    shards: Sequence[_Shard],
    layer: tuple[int, ...],
    form: TensorLayout,
    rows: tuple[int, int],
    dtype: np.dtype,
    read: np.ndarray,
) -> None:
    """Copies rows [begin, end) of a tensor into every buffer that holds a part of them."""
    begin, end = rows
    piece = form.pick(read.view(dtype).reshape(end - begin, *form.split[1:]))
    axis = form.order.index(0)
    for shard in shards:
        part = shard.slices[axis]
        low, high = max(begin, part.start), min(end, part.stop)
        if low >= high:
            continue
        # In the tensor's order of axes: the part of the piece that this shard holds.
        cut = [shard.slices[form.order.index(place)] for place in range(len(form.order))]
        cut[0] = slice(low - begin, high - begin)
        # In the parameter's order of axes: where that part is in the shard's buffer.
        places = [slice(0, other.stop - other.start) for other in shard.slices]
        places[axis] = slice(low - part.start, high - part.start)
        number = tuple(place - part.start for place, part in zip(layer, shard.layers, strict=True))
        shard.put(number, tuple(places), piece[tuple(cut)], form.order, form.moved_axes)


def _sum(
    stored: Mapping[str, StoredTensor],
    terms: Sequence[Term],
    layer: tuple[int, ...],
    shape: tuple[int, ...],
    shards: Sequence[_Shard],
) -> _Piece:
    """Describes the read of a small parameter in one piece: all its terms are read completely,
    transposed to its shape and added.
    """
    tensor = stored[terms[0].name]

    def put(read: np.ndarray) -> None:
        values = []
        for term in terms:
            found = stored[term.name]
            raw = read if term is terms[0] else _read_term(found)
            rows = raw.view(DTYPES[found.dtype]).reshape(found.shape)
            if found.shape:
                rows = rows[term.first : None if term.taken is None else term.first + term.taken]
            form = layout(term, shape)
            values.append(
                rows.reshape(form.split)[form.pick_index].transpose(form.order).reshape(shape)
            )
        value = (
            values[0] if len(values) == 1 else np.asarray(sum(v.astype(np.float32) for v in values))
        )
        for shard in shards:
            number = tuple(
                place - part.start for place, part in zip(layer, shard.layers, strict=True)
            )
            places = tuple(slice(0, part.stop - part.start) for part in shard.slices)
            shard.put(number, places, value[shard.slices], tuple(range(len(shape))), 0)

    return _Piece(tensor.file, tensor.start, tensor.bytes, put)


def _read_term(tensor: StoredTensor) -> np.ndarray:
    """Reads a tensor that is added to another, all its bytes; a transient error is retried."""
    memory = np.empty(tensor.bytes, np.uint8)
    return manifest.retry_read(lambda: paths.read_into(tensor.file, tensor.start, memory))


def _run(pieces: list[_Piece], title: str) -> None:
    """Reads every piece, in the order of the files, with threads that each reuse their own
    memory.
    """
    mine = threading.local()

    def one(piece: _Piece) -> int:
        if getattr(mine, "memory", None) is None or mine.memory.size < piece.bytes:
            mine.memory = np.empty(max(piece.bytes, min(PIECE, largest)), np.uint8)
        memory = mine.memory[: piece.bytes]
        piece.put(manifest.retry_read(lambda: paths.read_into(piece.file, piece.start, memory)))
        return piece.bytes

    total, largest = (
        sum(piece.bytes for piece in pieces),
        max((piece.bytes for piece in pieces), default=0),
    )
    done = 0
    with (
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
        Bar(title, total >> 20, enabled=bool(title) and total >= SHORT) as bar,
    ):
        pending = [
            pool.submit(one, piece)
            for piece in sorted(pieces, key=operator.attrgetter("file", "start"))
        ]
        try:
            for future in concurrent.futures.as_completed(pending):
                before, done = done, done + future.result()
                bar.advance((done >> 20) - (before >> 20), "MiB")
        except EOFError as error:
            raise UserError(f"{error}: copy it again") from error
        except OSError as error:
            raise manifest.unreadable(pieces[0].file.parent, error) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _transpose(target: np.ndarray, matrix: np.ndarray) -> None:
    """Computes target[...] = matrix.T in tiles: numpy's loop misses the cache at every
    element.
    """
    rows, columns = TILE
    # Rows whose length is a power of two map to few sets of the cache; the padding avoids
    # that.
    tile = np.empty((rows, columns + 32), target.dtype)
    for row in range(0, matrix.shape[0], rows):
        for column in range(0, matrix.shape[1], columns):
            part = matrix[row : row + rows, column : column + columns]
            near = tile[: part.shape[0], : part.shape[1]]
            cast_into(near, part)
            _bits(target)[column : column + columns, row : row + rows] = _bits(near).T


def cast_into(target: np.ndarray, source: np.ndarray) -> None:
    """Computes target[...] = source.astype(target.dtype).

    Copies and bfloat16 to float32 are done on integer views, since numpy is slow with
    bfloat16.
    """
    if source.dtype == target.dtype:
        np.copyto(_bits(target), _bits(source))
    elif source.dtype == ml_dtypes.bfloat16 and target.dtype == np.float32:
        np.left_shift(_bits(source), 16, out=_bits(target), dtype=np.uint32)
    else:
        np.copyto(target, source.astype(target.dtype))


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")
