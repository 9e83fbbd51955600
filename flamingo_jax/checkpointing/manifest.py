"""A manifest: the size and SHA-256 of every file in a folder, written last, so that a folder that has one is whole.

Array stores restore flipped bits without a word; a manifest finds and names the file. Its own text is canonical and holds its own digest, so
that damage to the manifest is told apart from damage to what it lists.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

NAME = "manifest.json"
_THREADS = min(4, os.cpu_count() or 1)


class DamageError(Exception):
    """A folder differs from its manifest; `file` is the first file that does, relative to the folder."""

    def __init__(self, folder: pathlib.Path, file: str, what: str):
        super().__init__(f"{folder / file} {what}")
        self.file = file


class Entry(NamedTuple):
    """What is known of one file."""

    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """Entries by path relative to the folder, and the SHA-256 of them all, which names the folder's content."""

    digest: str
    files: dict[str, Entry]


def write_manifest(folder: pathlib.Path) -> Manifest:
    """Digests every file below `folder` and writes the manifest atomically, after all of it has reached the disk."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        entries = dict(zip(names, pool.map(lambda name: _entry(folder / name, sync=True), names), strict=True))
    manifest = Manifest(_digest(entries), entries)
    write_atomically(folder / NAME, _canonical(manifest))
    return manifest


def read_manifest(folder: pathlib.Path) -> Manifest:
    """Raises: FileNotFoundError when there is none, DamageError when it is not as it was written."""
    text = (folder / NAME).read_bytes()
    try:
        raw = json.loads(text)
        manifest = Manifest(raw["digest"], {name: Entry(**entry) for name, entry in raw["files"].items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamageError(folder, NAME, "is not a manifest any more") from error
    if manifest.digest != _digest(manifest.files) or text != _canonical(manifest):
        raise DamageError(folder, NAME, "differs from what was written")
    return manifest


def check_sizes(folder: pathlib.Path, manifest: Manifest) -> None:
    """Raises DamageError for the first file that is missing or has another size; reads no file."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DamageError(folder, name, "is missing")
        size = path.stat().st_size
        if size != entry.bytes:
            raise DamageError(folder, name, f"has {size:,} bytes instead of {entry.bytes:,}")


def check_digests(folder: pathlib.Path, manifest: Manifest) -> None:
    """Raises DamageError for the first file whose size or content is not the manifest's; reads every byte."""
    check_sizes(folder, manifest)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _entry(folder / name), manifest.files)
        for name, entry in zip(manifest.files, found, strict=True):
            if entry != manifest.files[name]:
                raise DamageError(folder, name, "has other content than its manifest says")


def digest_files(folder: pathlib.Path, names: Sequence[str]) -> str:
    """SHA-256 over the digests of these files, each read once: names their content as a manifest's digest does."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return _digest(dict(zip(names, pool.map(lambda name: _entry(folder / name), names), strict=True)))


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """After this the file is there whole and on disk; before, at any moment, it is not there."""
    temporary = path.with_name(unfinished(path.name))
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def unfinished(name: str) -> str:
    """The name that a file or folder has until it is whole."""
    return name + ".writing"


def sync_folder(folder: pathlib.Path) -> None:
    """Makes renames in a folder outlast a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(path: pathlib.Path, *, sync: bool = False) -> Entry:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return Entry(file.tell(), digest)


def _digest(entries: dict[str, Entry]) -> str:
    listing = "".join(f"{entry.sha256}  {entry.bytes}  {name}\n" for name, entry in sorted(entries.items()))
    return hashlib.sha256(listing.encode()).hexdigest()


def _canonical(manifest: Manifest) -> bytes:
    content = {"digest": manifest.digest, "files": {name: entry._asdict() for name, entry in sorted(manifest.files.items())}}
    return (json.dumps(content, indent=1) + "\n").encode()
