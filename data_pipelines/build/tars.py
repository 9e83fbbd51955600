"""Lists the members of tar shards by reading their headers, past damage, and never unpacks to
disk.
"""

import pathlib
import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from data_pipelines.build.byte_ranges import (
    ERRORS,
    MAX_UNPACKED,
    STEP,
    ByteRange,
    Compression,
    compression_of,
)
from data_pipelines.build.files import FILLERS, UNREADABLE
from flamingo_jax.storage import LASTING, read_with_retries, storage_failure

SUFFIXES = (
    ".tar",
    ".tar.gz",
    ".tgz",
    ".tar.bz2",
    ".tbz2",
    ".tar.xz",
    ".txz",
    ".tar.zst",
    ".tar.lz4",
)
BLOCK = 512
"""Bytes of a tar file's blocks."""
MAX_HEADER = 1 << 20
"""The most bytes of a long name or extended header: a damaged file may declare any number."""

TRUNCATED = "cut off in the shard"
DAMAGED = "damaged stretch of a shard"
NO_TAR = "shard that is no tar file"
UNSAFE = "member whose name leads out of the shard"
EMPTY = "shard without a file in it"
NO_FILE = "member that is a link or a device"
SPARSE = "member that is stored with holes"
TOO_LONG = f"rest of a shard that unpacks to more than {MAX_UNPACKED >> 30} GiB"


class TarMember(NamedTuple):
    """A file in a shard: its name, without a leading `./`, and its bytes."""

    name: str
    byte_range: ByteRange


def compressed_with(shard: str | pathlib.Path) -> Compression | None:
    """Detects a shard's compression; None for a plain tar file, even if the name of its first
    member begins with the magic bytes of a compression. Raises OSError.
    """
    packing = compression_of(shard)
    if packing is None:
        return None
    with open(shard, "rb") as file:
        start = file.read(BLOCK)
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return packing
    return None


def unread(packing: Compression) -> str:
    """Returns the reason why a shard of this compression is not read."""
    needs = ", which needs Python 3.14 or backports.zstd" if packing.name == "zstd" else ""
    return f"shard compressed with {packing.name}{needs or ', which is not read'}"


def members(shard: str | pathlib.Path) -> list[TarMember | str]:
    """Lists the files in a shard, and a reason (str) for each member that is not usable.

    Compressed shards are decompressed in memory. After a damaged header reading continues at
    the next intact one. Hidden files, which macOS adds to archives, are skipped.

    Raises: StorageError where the storage kept failing.
    """
    try:
        return read_with_retries(lambda: list(_opened(shard)), shard, LASTING)
    except OSError:
        return [UNREADABLE]


def _opened(shard: str | pathlib.Path) -> Iterator[TarMember | str]:
    packing = compressed_with(shard)
    if packing is not None and packing.open is None:
        yield unread(packing)
        return
    with packing.open(str(shard)) if packing and packing.open else open(shard, "rb") as file:
        yield from _members(str(shard), _WatchedFile(file, packing is not None))


def _members(shard: str, file: "_WatchedFile") -> Iterator[TarMember | str]:
    """Yields the members of an opened shard, and reasons for what is lost."""
    end, data_end, seen = 0, 0, False
    last: TarMember | None = None  # Yielded only after its data is known to be complete.
    try:
        looked: Any = file
        with tarfile.open(
            fileobj=looked, mode="r:", ignore_zeros=True, errors="surrogateescape"
        ) as tar:
            while (member := tar.next()) is not None:
                untyped: Any = tar  # The type stubs lack `members`.
                untyped.members.clear()  # TarFile remembers all members: memory for nothing.
                if member.offset < end:
                    raise tarfile.ReadError("a header within a file")
                if last:
                    yield last
                    last = None
                if file.filled(member.offset):
                    yield DAMAGED  # tarfile has skipped nonzero bytes up to this header.
                seen, data = True, member.size if member.isreg() else 0
                data_end = tar.offset if member.issparse() else member.offset_data + data
                end = tar.offset
                file.look_from(end)
                if member.isreg() and not member.issparse():
                    if _leads_out(member.name):
                        yield UNSAFE
                    elif not _is_hidden(name := member.name.removeprefix("./")):
                        last = TarMember(
                            name, ByteRange(shard, member.offset_data, data, file.packed)
                        )
                elif not member.isdir():
                    yield SPARSE if member.issparse() else NO_FILE
        if last:
            yield last
            last = None
        if not seen:
            yield EMPTY if file.tell() > BLOCK and not file.filled() else NO_TAR
        elif file.filled():
            yield DAMAGED
    except Exception as error:  # A damaged header makes tarfile raise whatever it stumbles on.
        failure = storage_failure(error)
        if failure is not None and failure.errno not in LASTING:
            raise
        at_end = isinstance(error, EOFError) or (
            isinstance(error, tarfile.ReadError) and file.at_end
        )
        whole = data_end <= file.reached()
        if last and whole:
            yield last
        if isinstance(error, _TooLong):
            yield TOO_LONG
        elif not seen:
            yield NO_TAR
        elif not at_end or file.filled():
            yield DAMAGED
        elif not whole or isinstance(error, EOFError):
            yield TRUNCATED


def _leads_out(name: str) -> bool:
    return (
        name.startswith(("/", "\\"))
        or ".." in re.split(r"[/\\]", name)
        or re.match(r"[A-Za-z]:", name) is not None
    )


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part in FILLERS for part in name.split("/"))


class _TooLong(Exception):
    pass


class _WatchedFile:
    """A forward-only file for tarfile that records whether it read nonzero bytes.

    tarfile silently skips blocks that are not headers: nonzero bytes between members are
      damage.
    """

    def __init__(self, file: BinaryIO, packed: bool):
        self._file = file
        self.packed = packed
        self.at_end = False
        self._from = 0
        self._first: int | None = None

    def look_from(self, start: int) -> None:
        """Lets `filled` consider only what is read from `start` on."""
        self._from, self._first = start, None

    def filled(self, end: int | None = None) -> bool:
        """Returns whether nonzero bytes were read, before `end` if that is given."""
        return self._first is not None and (end is None or self._first < end)

    def reached(self) -> int:
        """Returns the readable size of the file, after decompression."""
        if not self.packed:
            return self._file.seek(0, 2)
        try:
            while self._file.read(STEP):
                if self._file.tell() > MAX_UNPACKED:
                    break
        except (OSError, *ERRORS):
            pass
        return self._file.tell()

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        """Reads at most `size` bytes, which must be plausible for a header."""
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.InvalidHeaderError(f"a header of {size} bytes")  # type: ignore[attr-defined]
        place = self._file.tell()
        data = self._file.read(size)
        self.at_end = len(data) < size
        if self._first is None and place >= self._from and data.strip(b"\0"):
            self._first = place
        if self.packed and place > MAX_UNPACKED:
            raise _TooLong
        return data

    def seek(self, place: int, whence: int = 0) -> int:
        """Moves to a place; a compressed file is read forward to it."""
        if not self.packed or whence:
            return self._file.seek(place, whence)
        while (left := place - self._file.tell()) > 0:
            if self._file.tell() > MAX_UNPACKED:
                raise _TooLong
            if not self._file.read(min(left, STEP)):
                break
        if left < 0:
            raise tarfile.ReadError("a header within a file")
        return self._file.tell()
