"""Streams tensors from storage to storage: described first, then read a piece at a time by one
thread while another writes, so that host memory holds a piece rather than a model.
"""

import collections
import hashlib
import pathlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flamingo_jax import paths
from flamingo_jax.checkpointing import manifest
from flamingo_jax.checkpointing.manifest import FileDigest
from flamingo_jax.pytrees import leaf_name, stack_axes

AHEAD_BYTES = 128 * 2**20
"""How many bytes the reading thread may be ahead of the writing one. A larger piece is read
when all before it are written."""
_SKIP_BYTES = 16 * 2**20
"""Bytes that are read at a time where they are only hashed."""


class HashingReader:
    """Reads byte ranges of files, and computes the digests of the complete files from the same
    reads: files that are read from front to back are read once. Not for several threads.
    """

    def __init__(self) -> None:
        self._hashes: dict[pathlib.Path, Any] = {}
        self._hashed: dict[pathlib.Path, int] = {}

    def read_into(self, file: pathlib.Path, start: int, memory: np.ndarray) -> np.ndarray:
        """Fills `memory` (uint8) from byte `start` of a file, as `paths.read_into`; a read that
        fails for the moment is retried.
        """
        self._hash_to(file, start)
        manifest.retry_read(lambda: paths.read_into(file, start, memory))
        done, end = self._hashed[file], start + len(memory)
        if done < end:
            self._hashes[file].update(memory.data[done - start :])
            self._hashed[file] = end
        return memory

    def digest(self, file: pathlib.Path) -> FileDigest:
        """Reads what has not been read of a file, and returns the file's digest.

        Raises: OSError where the file cannot be read.
        """
        size = manifest.retry_read(lambda: paths.version(file)).bytes
        self._hash_to(file, size)
        return FileDigest(self._hashed[file], self._hashes[file].hexdigest())

    def _hash_to(self, file: pathlib.Path, end: int) -> None:
        """Hashes a file up to byte `end`, as far as that has not been done."""
        if file not in self._hashes:
            self._hashes[file], self._hashed[file] = hashlib.sha256(), 0
        while (done := self._hashed[file]) < end:
            memory = np.empty(min(_SKIP_BYTES, end - done), np.uint8)
            manifest.retry_read(
                lambda done=done, memory=memory: paths.read_into(file, done, memory)  # type: ignore[misc]
            )
            self._hashes[file].update(memory)
            self._hashed[file] = done + len(memory)


class StreamedTensor(NamedTuple):
    """A tensor that is not in memory yet.

    name: per layer, such as "layers/12/attention/query".
    pieces: yields its values in row-major order as contiguous arrays, reading files by the
      given reader.
    held: the most bytes that `pieces` holds in host memory at a time.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[HashingReader], Iterator[np.ndarray]]
    held: int

    @property
    def bytes(self) -> int:
        """The size of its values."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class TensorStream(NamedTuple):
    """Tensors in the order in which they are best read.

    identity: identifies their values, "" if it is not known: an unfinished export of the same
      identity is continued.
    check: called when all tensors have been read with the reader that read them; raises where
      a file is not what it should be. A tensor that was read by an earlier start is read here.
    """

    tensors: Sequence[StreamedTensor]
    identity: str = ""
    check: Callable[[HashingReader], None] = lambda reader: None


def whole(tensor: StreamedTensor, reader: HashingReader) -> np.ndarray:
    """Reads a tensor completely."""
    result = np.empty(tensor.shape, tensor.dtype)
    flat, done = result.reshape(-1), 0
    for piece in tensor.pieces(reader):
        flat[done : done + piece.size] = piece.reshape(-1)
        done += piece.size
    return result


def stream_arrays(parameters: Mapping[str, Any]) -> TensorStream:
    """Streams arrays that are in memory, {flat stacked name: array}, layer by layer.

    Raises: ValueError for an array that lies partly on other processes.
    """
    tensors: list[StreamedTensor] = []
    for name in sorted(parameters):
        value = parameters[name]
        if not isinstance(value, jax.Array):
            value = np.asarray(value)
        elif not value.is_fully_addressable:
            raise ValueError(f"{name} lies partly on other processes: gather it before the export")
        elif len(value.devices()) == 1 and next(iter(value.devices())).platform == "cpu":
            value = np.asarray(value)  # A view.
        axes = stack_axes(name)
        shape = tuple(value.shape[axes:])
        size = int(np.prod(shape, dtype=np.int64)) * value.dtype.itemsize
        for index in np.ndindex(value.shape[:axes]):

            def pieces(
                reader: HashingReader, value: Any = value, index: tuple[int, ...] = index
            ) -> Iterator[np.ndarray]:
                # Sliced before it is copied to the host, a layer at a time.
                yield np.ascontiguousarray(np.asarray(value[index] if index else value))

            tensors.append(
                StreamedTensor(leaf_name(name, index), np.dtype(value.dtype), shape, pieces, size)
            )
    return TensorStream(tensors)


def read_ahead(
    tensors: Iterable[StreamedTensor], reader: HashingReader
) -> Generator[tuple[StreamedTensor, np.ndarray]]:
    """Yields the pieces of tensors, each with its tensor, while a thread reads the next ones,
    at most `AHEAD_BYTES` ahead. Whatever the thread raises is raised here.
    """
    buffer = _Buffer()

    def read() -> None:
        try:
            for tensor in tensors:
                pieces, left = tensor.pieces(reader), tensor.bytes
                while buffer.reserve(tensor.held):
                    piece = next(pieces, None)
                    if piece is None:
                        buffer.give_back(tensor.held)
                        break
                    left -= piece.nbytes
                    buffer.put((tensor, piece), tensor.held)
                    del piece
                if left:
                    raise ValueError(f"{tensor.name} is {-left:+d} bytes longer than described")
            buffer.put(None, 0)
        except BaseException as error:  # noqa: BLE001 - raised where the pieces are taken
            buffer.put(error, 0)

    thread = threading.Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (found := buffer.take()) is not None:
            if isinstance(found, BaseException):
                raise found
            size = found[1].nbytes
            yield found
            del found
            buffer.give_back(size)
    finally:
        buffer.close()
        thread.join()


class _Buffer:
    """Hands pieces from one thread to another, and counts the bytes in memory."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: collections.deque[Any] = collections.deque()
        self._used, self._closed = 0, False

    def reserve(self, size: int) -> bool:
        """Waits until `size` bytes may be used; returns False when nobody takes any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or not self._used or self._used + size <= AHEAD_BYTES
            )
            self._used += size
            return not self._closed

    def put(self, item: Any, reserved: int) -> None:
        """Adds an item that takes the place of reserved bytes."""
        with self._changed:
            self._used -= reserved
            if isinstance(item, tuple):
                self._used += item[1].nbytes
            self._waiting.append(item)
            self._changed.notify_all()

    def take(self) -> Any:
        """Waits for the next item and removes it; its bytes count until `give_back`."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            return self._waiting.popleft()

    def give_back(self, size: int) -> None:
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
