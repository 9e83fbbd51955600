"""Paths on a disk or in a bucket, with one interface, that of `pathlib.Path`.

A string that begins with `gs://` or `s3://` becomes a `BucketPath` (extra `.[bucket]`); any
other string is a `pathlib.Path`, so that nothing changes for disks. Credentials and endpoints
are found as by the stores' own tools (`GOOGLE_APPLICATION_CREDENTIALS`, `AWS_PROFILE`,
`AWS_ENDPOINT_URL`, a machine's role).

A bucket is no file system: files are written atomically and cannot be appended to, and a
folder is only a common prefix of names, which cannot be renamed atomically. So data in several
files is valid once its manifest exists. The functions here are those for which disks and
buckets need different code.
"""

import errno
import importlib.util
import os
import pathlib
import re
import shutil
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from flamingo_jax.bucket_path import BucketPath, require_reachable
from flamingo_jax.errors import UserError

if TYPE_CHECKING:  # Commands that only print help do not wait for it.
    import numpy as np

STORES = {"gs": "gcsfs", "s3": "s3fs"}
"""{scheme of a bucket: the package that reads it}."""
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


class FileVersion(NamedTuple):
    """Identifies the content of a file without reading it: where none of these change, the
    content has not changed.

    changed: modification time by the storage's clock, in seconds.
    id: the inode, or computed from the entity tag.
    """

    bytes: int
    changed: float
    id: int


def as_path(place: str | pathlib.Path) -> pathlib.Path:
    """Converts a string to the path of a file or folder on a disk or in a bucket.

    Raises: UserError for an unknown scheme, a missing bucket name, or a store whose package is
      not installed.
    """
    if not isinstance(place, str):
        return place
    scheme = _SCHEME.match(place)
    if scheme is None:
        return pathlib.Path(place)
    kind = scheme[1]
    if kind not in STORES:
        raise UserError(
            f"{place} begins with {kind}://, which is not known: name a folder, gs://... or s3://..."
        )
    if not place[scheme.end() :].strip("/"):
        raise UserError(f"{place} names no bucket: write {kind}://BUCKET/FOLDER")
    if importlib.util.find_spec(STORES[kind]) is None:
        raise UserError(
            f"{place} is in a bucket, which needs {STORES[kind]}: pip install"
            " 'flamingo_jax[bucket]'"
        )
    found: Any = BucketPath(kind, place[scheme.end() :].strip("/"))
    require_reachable(found)
    return found


def is_bucket(path: Any) -> bool:
    """Returns whether a path, or the string of one, is in a bucket."""
    if isinstance(path, str):
        return path.startswith(tuple(f"{kind}://" for kind in STORES))
    return isinstance(path, BucketPath)


def require_mounted(path: str, what: str) -> None:
    """Raises UserError for a bucket path where a file system is required."""
    if is_bucket(path):
        tool = "gcsfuse" if path.startswith("gs://") else "mountpoint-s3"
        raise UserError(
            f"{what} is {path}, but datasets are read as files: mount the bucket ({tool}, as"
            " launch/README.md shows) and name the folder of the mount"
        )


def compilation_cache(workdir: pathlib.Path) -> pathlib.Path:
    """Returns the folder of JAX's compilation cache for a run: in its workdir, or on this
    machine if that is in a bucket, which is too slow for many small files.
    """
    if is_bucket(workdir):
        return machine_compilation_cache()
    return workdir.absolute() / "compiled"


def machine_compilation_cache() -> pathlib.Path:
    """Returns the folder of JAX's compilation cache on this machine, for what has no workdir."""
    return pathlib.Path.home() / ".cache" / "flamingo_jax" / "compiled"


def create(path: pathlib.Path, content: bytes) -> bool:
    """Creates a file if it does not exist; returns whether this process did: only one can. On
    a disk the content is synced before this returns.
    """
    if is_bucket(path):
        bucket: Any = path
        return bucket.create(content)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    # A file without its content is worse than none: it is removed again.
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def version(path: pathlib.Path) -> FileVersion:
    """Returns size, modification time and identity of a file. Raises OSError."""
    if not is_bucket(path):
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, "is no file", str(path))
        return FileVersion(found.st_size, found.st_mtime_ns / 1e9, found.st_ino)
    made: Any = path
    found = made.version()
    return FileVersion(found.bytes, found.changed, int.from_bytes(found.tag.encode()[:15], "big"))


def make_folder(folder: pathlib.Path) -> None:
    """Creates a folder if it does not exist. In a bucket folders need not be created; the
    bucket itself is not.
    """
    if not is_bucket(folder):
        folder.mkdir(parents=True, exist_ok=True)


def files_below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields every file below a folder. Raises OSError where a folder cannot be listed, which
    `rglob` would skip silently.
    """
    if is_bucket(folder):
        bucket: Any = folder
        yield from bucket.files_below()
        return

    def fail(error: OSError) -> None:
        raise error

    for place, _, names in os.walk(folder, onerror=fail):
        yield from (pathlib.Path(place, name) for name in names)


def sizes_below(folder: pathlib.Path) -> dict[str, int]:
    """Returns {path relative to the folder: bytes} of every file below it. Raises OSError."""
    if is_bucket(folder):
        bucket: Any = folder
        return bucket.sizes_below()
    return {
        file.relative_to(folder).as_posix(): file.stat().st_size for file in files_below(folder)
    }


def subfolders(folder: pathlib.Path) -> list[str]:
    """Returns the names of the folders within a folder. Raises OSError."""
    if is_bucket(folder):
        bucket: Any = folder
        return bucket.folders()
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_dir()]


def remove_folder(folder: pathlib.Path) -> None:
    """Removes a folder with all that is in it. Raises OSError."""
    if is_bucket(folder):
        bucket: Any = folder
        bucket.rmtree()
    else:
        shutil.rmtree(folder)


def upload(file: pathlib.Path, path: pathlib.Path) -> None:
    """Copies a file from a disk to a bucket, atomically. Raises OSError."""
    bucket: Any = path
    bucket.upload(file)


def read_into(file: pathlib.Path, start: int, memory: "np.ndarray") -> "np.ndarray":
    """Fills `memory` (uint8) from byte `start` of a file.

    Raises: EOFError where the file ends too early, OSError where it cannot be read.
    """
    if is_bucket(file):
        bucket: Any = file
        read = bucket.read_range(start, len(memory))
        if len(read) < len(memory):
            raise EOFError(f"{file} ends too early")
        memory.data[:] = read
        return memory
    with open(file, "rb", buffering=0) as stream:
        stream.seek(start)
        # A read may return fewer bytes than asked for.
        view, done = memory.data, 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise EOFError(f"{file} ends too early")
            done += count
    return memory
