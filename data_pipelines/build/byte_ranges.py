"""Reads byte ranges of files, of compressed ones too, without unpacking them to disk."""

import bz2
import collections
import functools
import gzip
import importlib
import lzma
import os
import pathlib
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

from data_pipelines.build.files import MAX_BYTES, TOO_LARGE, UNREADABLE
from flamingo_jax.storage import LASTING, read_with_retries

MAX_UNPACKED = 64 << 30
"""The most bytes of a decompressed file: a small file may decompress to any size."""
STREAMS = 4
"""Decompression streams that a process keeps open: samples whose members are far apart are
read at several places alternately, each by a stream of its own.
"""
STEP = 1 << 20
"""Bytes to decompress at a time when skipping to an offset."""

ERRORS = (EOFError, zlib.error, lzma.LZMAError, ValueError)
"""Exceptions of reading a damaged compressed file, besides OSError."""


class Compression(NamedTuple):
    """A compression format.

    start: the magic bytes. open: opens a file for reading; None if it is not supported.
    """

    name: str
    start: bytes
    open: Callable[[str], Any] | None = None


def _zstd() -> Callable[[str], Any] | None:
    """Returns ZstdFile of Python 3.14 or backports.zstd; None if neither is installed."""
    for module in ("compression.zstd", "backports.zstd"):
        try:
            opened: Callable[[str], Any] = importlib.import_module(module).ZstdFile
        except ImportError:
            continue
        return opened
    return None


COMPRESSIONS = (
    Compression("gzip", b"\x1f\x8b", gzip.GzipFile),
    Compression("bzip2", b"BZh", bz2.BZ2File),
    Compression("xz", b"\xfd7zXZ\0", lzma.LZMAFile),
    Compression("zstd", b"\x28\xb5\x2f\xfd", _zstd()),
    Compression("lz4", b"\x04\x22\x4d\x18"),
    Compression("compress", b"\x1f\x9d"),
)


def compression_of(path: str | pathlib.Path) -> Compression | None:
    """Detects a file's compression by its magic bytes; None for an uncompressed file.

    Raises: OSError.
    """
    with open(path, "rb") as file:
        start = file.read(max(len(packing.start) for packing in COMPRESSIONS))
    return next((packing for packing in COMPRESSIONS if start.startswith(packing.start)), None)


class TooLarge(OSError):
    """Raised for more bytes than an image, a caption or a page may have."""


class ByteRange(NamedTuple):
    """`size` bytes of a file from `offset` on; size None for the rest of the file.

    packed: the file is compressed, and the range is of its decompressed content.
    """

    file: str
    offset: int = 0
    size: int | None = None
    packed: bool = False

    def read(self) -> bytes:
        """Reads the bytes. Ranges of a compressed file are best read in increasing order.

        Raises: OSError, also where the file is too short; TooLarge; StorageError where the
          storage kept failing.
        """
        most = MAX_BYTES + 1 if self.size is None else self.size
        if (self.size or 0) > MAX_BYTES:
            raise TooLarge(f"{self.size} bytes of {self.file} are more than {MAX_BYTES}")
        data = read_with_retries(functools.partial(self._read, most), self.file, LASTING)
        if len(data) > MAX_BYTES:
            raise TooLarge(f"{self.file} is larger than {MAX_BYTES} bytes")
        if self.size is not None and len(data) != self.size:
            raise OSError(f"{self.file} does not hold what is looked for")
        return data

    def _read(self, most: int) -> bytes:
        if self.packed:
            return _STREAMS.read(self.file, self.offset, most)
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read(most)


class _Stream(NamedTuple):
    """A decompression stream, and the identity of its file when it was opened."""

    identity: tuple[int, ...]
    file: BinaryIO


class _Streams:
    """The decompression streams of this process, which only read forward."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._open: collections.OrderedDict[int, _Stream] = collections.OrderedDict()
        self._opened = 0

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Reads decompressed bytes; fewer than `size` at the end. Raises OSError."""
        # After a fork, parent and child would share the file positions of open streams.
        if self._process != os.getpid():
            self._process = os.getpid()
            self._open = collections.OrderedDict()
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        try:
            number, stream = self._before(path, identity, offset)
        except ERRORS as error:
            raise OSError(f"{path} cannot be unpacked: {error}") from error
        try:
            while (left := offset - stream.tell()) > 0:
                if not stream.read(min(left, STEP)):
                    return b""
            data = stream.read(size)
        except ERRORS as error:
            self._open.pop(number).file.close()
            raise OSError(f"{path} cannot be unpacked: {error}") from error
        except OSError:
            self._open.pop(number).file.close()
            raise
        return data

    def _before(self, path: str, identity: tuple[int, ...], offset: int) -> tuple[int, BinaryIO]:
        """Returns the open stream of a file that is nearest before `offset`, or opens one."""
        fit = [
            (stream.file.tell(), number)
            for number, stream in self._open.items()
            if stream.identity == identity and stream.file.tell() <= offset
        ]
        if fit:
            number = max(fit)[1]
            self._open.move_to_end(number)
            return number, self._open[number].file
        packing = compression_of(path)
        if packing is None or packing.open is None:
            raise OSError(f"{path} cannot be unpacked")
        if len(self._open) == STREAMS:
            self._open.popitem(last=False)[1].file.close()
        self._opened += 1
        self._open[self._opened] = _Stream(identity, packing.open(path))
        return self._opened, self._open[self._opened].file


_STREAMS = _Streams()


def why(error: OSError) -> str:
    """Returns the reason, as it is counted, for an error of `ByteRange.read`."""
    return TOO_LARGE if isinstance(error, TooLarge) else UNREADABLE
