"""Writes and checks manifests: the size and SHA-256 of every file in a folder. The manifest is
written last, so a folder that has one is complete.

Array stores restore flipped bits silently; a manifest detects them and names the file. Its
text is canonical and contains its own digest, which distinguishes damage to the manifest from
damage to the files that it lists.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from flamingo_jax import paths
from flamingo_jax.errors import StorageError
from flamingo_jax.storage import retry

NAME = "manifest.json"
_THREADS = min(4, os.cpu_count() or 1)
_PART = 4 << 20
"""Bytes that are read between two reports of progress."""
_BUCKET_THREADS = 32
"""More than on a disk, since these threads mostly wait for the object store."""
_BUCKET_PART = 32 << 20
"""Like `_PART`, for a bucket, where each part is one request."""
READ_AGAIN_AFTER = (0.2, 1.0, 5.0)
"""Seconds to wait before each retry of a failed read: network storage fails at times."""
Progress = Callable[[], None]
"""Called from any thread as bytes are read, so that a watcher sees that work is going on."""
T = TypeVar("T")


class DamageError(Exception):
    """Signals that a folder differs from its manifest. `file` is the first file that differs,
    relative to the folder.

    A file that cannot be read at the moment is not damaged: it raises an OSError.
    """

    def __init__(self, folder: pathlib.Path, file: str, what: str):
        super().__init__(f"{folder / file} {what}")
        self.file = file


class FileDigest(NamedTuple):
    """Holds the size and the digest (hexadecimal) of one file."""

    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """Holds {path relative to the folder: digest of the file}, and the SHA-256 of them all,
    which identifies the content of the folder.
    """

    digest: str
    files: dict[str, FileDigest]


def retry_read(read: Callable[[], T]) -> T:
    """Calls `read` and returns its result; retries a few times if it raises an OSError, and
    raises the last one. A missing file is not retried.
    """
    return retry(read, READ_AGAIN_AFTER, _may_pass)


def _may_pass(error: Exception, wait: float) -> bool:
    missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
    return isinstance(error, OSError) and not missing


def unreadable(where: pathlib.Path, error: Exception) -> StorageError:
    """Makes the error for a path that could not be read at the moment but may be intact: its
    exit code makes launchers start the command again.
    """
    name = getattr(error, "filename", None) or where
    said = next(iter(str(error).splitlines()), type(error).__name__)
    reason = (getattr(error, "strerror", None) or said)[:300]
    mend = "mend the storage and start again; nothing was changed"
    return StorageError(f"{name} cannot be read just now ({reason}): {mend}")


def require_readable(file: pathlib.Path) -> None:
    """Raises the OSError of a file that cannot be opened at the moment, which safetensors
    would report as a missing file."""
    retry_read(lambda: open(file, "rb").close())


def is_there(path: pathlib.Path) -> bool:
    """Checks whether a file or folder exists. Raises an OSError if that cannot be found out,
    where `Path.exists` returns False in some versions of Python.
    """
    if paths.is_bucket(path):
        return retry_read(path.exists)
    try:
        retry_read(lambda: os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def write_manifest(
    folder: pathlib.Path,
    progress: Progress = lambda: None,
    *,
    known: Mapping[str, FileDigest] | None = None,
    besides: Container[str] = (),
) -> Manifest:
    """Hashes every file below `folder`, flushes it to the disk, and then writes the manifest
    atomically.

    known: digests of files that were flushed and hashed as they were written. besides: names of
    files that do not belong to the content.
    """
    known = known or {}
    listed = paths.sizes_below(folder).items()
    sizes = {
        name: size
        for name, size in listed
        if name != NAME and name not in known and name not in besides
    }
    with concurrent.futures.ThreadPoolExecutor(_threads(folder)) as pool:
        made = pool.map(
            lambda name: _entry(folder / name, progress, sync=True, total=sizes[name]),
            sorted(sizes),
        )
        entries = dict(zip(sorted(sizes), made, strict=True)) | dict(known)
    manifest = Manifest(_digest(entries), entries)
    write_atomically(folder / NAME, _canonical(manifest))
    return manifest


def read_manifest(folder: pathlib.Path) -> Manifest:
    """Reads the manifest of a folder.

    Raises: FileNotFoundError when there is none, DamageError when it is not as it was written,
      OSError when it cannot be read at the moment.
    """
    text = retry_read((folder / NAME).read_bytes)
    try:
        raw = json.loads(text)
        manifest = Manifest(
            raw["digest"], {name: FileDigest(**entry) for name, entry in raw["files"].items()}
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamageError(folder, NAME, "is not a manifest any more") from error
    if manifest.digest != _digest(manifest.files) or text != _canonical(manifest):
        raise DamageError(folder, NAME, "differs from what was written")
    return manifest


def check_sizes(folder: pathlib.Path, manifest: Manifest) -> None:
    """Compares the sizes of files with the manifest, without reading them.

    Raises: DamageError for the first file that is missing or has another size, OSError for one
      whose size cannot be read at the moment.
    """
    listed = retry_read(lambda: paths.sizes_below(folder)) if paths.is_bucket(folder) else None
    for name, entry in manifest.files.items():
        size = _size(folder, name) if listed is None else listed.get(name)
        if size is None:
            raise DamageError(folder, name, "is missing")
        if size != entry.bytes:
            raise DamageError(folder, name, f"has {size:,} bytes instead of {entry.bytes:,}")


def _size(folder: pathlib.Path, name: str) -> int | None:
    """Returns the size of a file, None if it is missing. Raises DamageError for a folder."""
    try:
        return retry_read(lambda: paths.version(folder / name)).bytes
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError:
        raise DamageError(folder, name, "is no file") from None


def check_digests(
    folder: pathlib.Path,
    manifest: Manifest,
    progress: Progress = lambda: None,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
) -> None:
    """Compares every byte of the files with the manifest; of files that are not `wanted`, only
    the sizes.

    Raises: DamageError for the first file whose size or content differs, OSError for one that
      cannot be read at the moment.
    """
    check_sizes(folder, manifest)
    names = [name for name in manifest.files if wanted(name)]
    with concurrent.futures.ThreadPoolExecutor(_threads(folder)) as pool:
        found = pool.map(
            lambda name: retry_read(
                lambda: _entry(folder / name, progress, total=manifest.files[name].bytes)
            ),
            names,
        )
        for name, digest in zip(names, found, strict=True):
            if digest != manifest.files[name]:
                raise DamageError(folder, name, "has other content than its manifest says")


def file_digest(file: pathlib.Path, progress: Progress = lambda: None) -> FileDigest:
    """Computes the size and SHA-256 of a file. Raises OSError."""
    return retry_read(lambda: _entry(file, progress))


def digest_of(entries: dict[str, FileDigest]) -> str:
    """Computes the SHA-256 over the digests of files, sorted by name, which identifies their
    content; `Manifest.digest` is the same.
    """
    return _digest(entries)


def write_atomically(path: pathlib.Path, *content: bytes | memoryview) -> None:
    """Writes a file atomically: at any moment it is either absent or complete, and when this
    returns it is on the disk.

    content: its bytes; several parts follow each other without being copied together.
    """
    if paths.is_bucket(path):
        # An object of a bucket appears only when it is complete.
        path.write_bytes(b"".join(content))
        return
    # Write to a temporary name, flush to the disk, and rename, which is atomic.
    temporary = path.with_name(unfinished(path.name))
    with open(temporary, "wb") as file:
        for part in content:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def unfinished(name: str) -> str:
    """Returns the name that a file or folder has until it is complete."""
    return name + ".writing"


def sync_file(path: pathlib.Path) -> None:
    """Flushes a file to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: pathlib.Path) -> None:
    """Flushes a folder, so that renames in it survive a power cut."""
    if paths.is_bucket(folder):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _threads(folder: pathlib.Path) -> int:
    return _BUCKET_THREADS if paths.is_bucket(folder) else _THREADS


def _entry(
    path: pathlib.Path,
    progress: Progress = lambda: None,
    *,
    sync: bool = False,
    total: int | None = None,
) -> FileDigest:
    digest, size = hashlib.sha256(), 0
    for part in _parts(path, sync, total):
        digest.update(part)
        size += len(part)
        progress()
    return FileDigest(size, digest.hexdigest())


def _parts(path: pathlib.Path, sync: bool, total: int | None) -> Iterator[bytes]:
    """Yields the content of a file part by part; with `sync`, flushes it to the disk at the
    end.

    total: size of the file, if known, which saves a request to a bucket.
    """
    if paths.is_bucket(path):
        # Byte ranges, so that a large object is never in memory completely.
        bucket: Any = path
        total = paths.version(path).bytes if total is None else total
        for start in range(0, total, _BUCKET_PART):
            yield bucket.read_range(start, min(_BUCKET_PART, total - start))
        return
    with open(path, "rb") as file:
        while part := file.read(_PART):
            yield part
        if sync:
            os.fsync(file.fileno())


def _digest(entries: dict[str, FileDigest]) -> str:
    listing = "".join(
        f"{entry.sha256}  {entry.bytes}  {name}\n" for name, entry in sorted(entries.items())
    )
    return hashlib.sha256(listing.encode()).hexdigest()


def _canonical(manifest: Manifest) -> bytes:
    content = {
        "digest": manifest.digest,
        "files": {name: entry._asdict() for name, entry in sorted(manifest.files.items())},
    }
    return (json.dumps(content, indent=1) + "\n").encode()
