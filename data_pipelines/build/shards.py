"""Bytes within files: tar shards as WebDataset and img2dataset write them, read where they lie. Nothing is ever unpacked to disk."""

import dataclasses
import hashlib
import os
import pathlib
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from data_pipelines.build import files
from data_pipelines.build.captions import parsed
from data_pipelines.build.pictures import Unfit
from flamingo_jax.errors import UserError
from flamingo_jax.progress import Bar

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
MAX_BYTES = 256 << 20
"""A larger file is no picture and no caption."""
BLOCK = 512
"""Tar files consist of blocks of so many bytes."""

DIGITS = re.compile(r"(?:^|[/\\\\])[0-9a-f]{64}\.[^./\\\\]+$")

TRUNCATED = "cut off in the shard"
DAMAGED = "damaged stretch of a shard"
NO_TAR = "shard that is no tar file"
UNSAFE = "member whose name leads out of the shard"
NO_FILE = "member that is a link or a device"


class Piece(NamedTuple):
    """`size` bytes of a file from `offset` on; size None for all of it."""

    file: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Raises OSError, also where the file is too short or too large."""
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            data = file.read(MAX_BYTES + 1 if self.size is None else self.size) if (self.size or 0) <= MAX_BYTES else b""
        if len(data) > MAX_BYTES or (self.size is not None and len(data) != self.size):
            raise OSError(f"{self.file} does not hold what is looked for")
        return data


@dataclasses.dataclass(frozen=True)
class Sample:
    """The members of a shard with the same name before the first dot, by what follows it, in small letters."""

    key: str
    members: dict[str, Piece]

    def first(self, endings: Sequence[str]) -> Piece | None:
        """The first member with one of these endings, which may have more before it, as in `0.input.jpg`."""
        for name, piece in self.members.items():
            if name.rsplit(".", maxsplit=1)[-1] in endings:
                return piece
        return None


class Found(NamedTuple):
    """A file of one of the inputs: `name` is its path below the folder `root`."""

    root: pathlib.Path
    name: str

    @property
    def path(self) -> pathlib.Path:
        return self.root / self.name


def files_in(inputs: Sequence[str], suffixes: Sequence[str], what: str) -> list[Found]:
    """The inputs that are files, and files of these suffixes below those that are folders. Raises UserError where there is none."""
    found = []
    for name in inputs:
        path = pathlib.Path(name)
        if path.is_dir():
            listing = files.walk(path, suffixes, inputs)
            if listing.refused:
                met = listing.refused[0]
                raise UserError(
                    f"{path / met.name} is not read ({met.reason}): mend it, remove it, "
                    "or name what a link leads to with --input"
                )
            found += [Found(path, name) for name in listing.names]
        elif path.is_file():
            found.append(Found(path.parent, path.name))
        else:
            raise UserError(f"there is no file or folder {path}: mend --input")
    if not found:
        raise UserError(f"there is no {what} ({', '.join(suffixes)}) below {', '.join(inputs)}: unpack what is compressed, or mend --input")
    return found


def read_named(folders: Sequence[str], name: str) -> bytes:
    """The file of that name in the first of the folders that has it. Raises Unfit."""
    return files.read(files.find(folders, name))


def folders_of(inputs: Sequence[str]) -> tuple[str, ...]:
    """The inputs that are folders, and the folders of those that are files: where pictures lie unless another place is named."""
    return tuple(dict.fromkeys(name if os.path.isdir(name) else os.path.dirname(name) or "." for name in inputs))


def samples(shard: pathlib.Path) -> Iterator[Sample | str]:
    """Neighbouring members with the same key together, and a reason for each that is of no use; a pure reading of the shard's headers.

    Keys are WebDataset's: all before the first dot of the last part of the name.
    """
    key: tuple[str, str] | None = None
    members: dict[str, Piece] = {}
    for member in _members(shard):
        if isinstance(member, str):
            yield member
            continue
        name, piece = member
        folder, _, file = name.rpartition("/")
        stem, _, ending = file.partition(".")
        if (folder, stem) != key:
            if members and key:
                yield Sample("/".join(filter(None, key)), members)
            key, members = (folder, stem), {}
        members.setdefault(ending.lower(), piece)
    if members and key:
        yield Sample("/".join(filter(None, key)), members)


def _members(shard: pathlib.Path) -> Iterator[tuple[str, Piece] | str]:
    """Name and place of every file, and a reason for whatever else is met. A damaged header is passed over, to the next that is whole."""
    end, seen = 0, False
    try:
        size = shard.stat().st_size
        with tarfile.open(shard, "r:", ignore_zeros=True, errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                if member.offset < end:
                    raise tarfile.ReadError("a header within a file")
                if _filled(shard, end, member.offset):
                    yield DAMAGED
                seen, data = True, member.size if member.isreg() else 0
                end = member.offset_data + -(-data // BLOCK) * BLOCK
                if member.offset_data + data > size:
                    yield TRUNCATED
                    return
                if member.isreg() and not member.issparse():
                    unsafe = member.name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member.name) or re.match(r"[A-Za-z]:", member.name)
                    yield UNSAFE if unsafe else (member.name.removeprefix("./"), Piece(str(shard), member.offset_data, data))
                elif not member.isdir():
                    yield NO_FILE
        if not seen:
            yield NO_TAR
        elif _filled(shard, end, size):
            yield DAMAGED
    except Exception:  # noqa: BLE001 - a damaged header makes tarfile raise whatever it stumbles on.
        yield DAMAGED if seen else NO_TAR


def _filled(file: pathlib.Path, start: int, end: int) -> bool:
    """Whether there is more than the zeros that end an archive between two of a file's places."""
    with file.open("rb") as opened:
        opened.seek(start)
        while start < end and (part := opened.read(min(end - start, 1 << 20))):
            if part.strip(b"\0"):
                return True
            start += len(part)
    return False


def by_address(folders: Sequence[str]) -> dict[bytes, Piece]:
    """Downloaded pictures by their address on the web (`address_key`), below folders of

    - what img2dataset made (`output_format` webdataset or files), whose .json files have the `url`;
    - files named by the SHA-256 of their address in hexadecimal digits, with any ending of a picture.
    """
    found: dict[bytes, Piece] = {}
    below = [
        str(pathlib.Path(folder, name))
        for folder in folders
        for name in files.walk(folder, given=folders).names
    ]
    paths = [
        pathlib.Path(file)
        for file in sorted(below)
        if file.lower().endswith((".tar", ".json")) or DIGITS.search(file)
    ]
    known = frozenset(below)
    with Bar("pictures by address", len(paths)) as bar:
        for path in paths:
            bar.advance()
            ending = path.suffix.lower()[1:]
            if ending == "tar":
                for sample in samples(path):
                    if isinstance(sample, Sample) and (picture := sample.first(PICTURES)) and (about := sample.first(("json",))):
                        _enter(found, about, picture)
            elif ending == "json":
                beside = (path.with_suffix(f".{ending}") for ending in PICTURES)
                if picture_file := next((file for file in beside if str(file) in known), None):
                    _enter(found, Piece(str(path)), Piece(str(picture_file)))
            elif ending in PICTURES:
                found.setdefault(bytes.fromhex(path.stem), Piece(str(path)))
    return found


def address_key(address: str) -> bytes:
    return hashlib.sha256(address.encode(errors="surrogateescape")).digest()


def reader(folders: Sequence[str], name: object, downloaded: Piece | None) -> Callable[[], bytes]:
    """What reads a picture: the file known by its address, else the one of that name below the folders. It raises Unfit."""

    def read() -> bytes:
        if downloaded is None and isinstance(name, str) and name:
            return read_named(folders, name)
        if downloaded is None:
            raise Unfit(files.MISSING)
        try:
            return downloaded.read()
        except OSError as error:
            raise Unfit("unreadable") from error

    return read


def _enter(found: dict[bytes, Piece], about: Piece, picture: Piece) -> None:
    try:
        record = parsed(about.read().decode("utf-8", "surrogateescape"))
    except OSError:
        return
    if isinstance(record, dict) and isinstance(record.get("url"), str):
        found.setdefault(address_key(record["url"]), picture)
