"""A path in a bucket of Google Cloud Storage or S3, with the methods of `pathlib.Path` that
the project uses, over fsspec.

Failed requests raise OSError, as on a disk: the several dozen exceptions of the stores'
libraries that are no OSErrors are converted.
"""

import contextlib
import errno
import fnmatch
import functools
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from flamingo_jax.errors import StorageError, UserError

STORE_LIBRARIES = (
    "botocore",
    "aiobotocore",
    "boto3",
    "aiohttp",
    "gcsfs",
    "google",
    "fsspec",
    "requests",
)
"""Packages whose exceptions are converted to OSError."""
_TAKEN = ("PreconditionFailed", "ConditionalRequestConflict")
"""S3's error codes for creating an object that already exists: 412, or 409 while another
writer is creating it.
"""


class ObjectVersion(NamedTuple):
    """An object's size, modification time by the store's clock in seconds, and entity tag."""

    bytes: int
    changed: float
    tag: str


class BucketPath:
    """The path `<scheme>://<bucket>/<key>`.

    A folder exists as long as the name of some object begins with it. Nothing is cached
    between calls, since other processes write as well.
    """

    def __init__(self, scheme: str, place: str | pathlib.PurePosixPath):
        self.scheme = scheme
        self._place = pathlib.PurePosixPath(place)
        """The bucket and the key in it."""

    # -- names --

    @property
    def bucket(self) -> str:
        return self._place.parts[0]

    @property
    def key(self) -> str:
        """The name within the bucket, "" for the bucket itself."""
        return "/".join(self._place.parts[1:])

    @property
    def name(self) -> str:
        return self._place.name

    @property
    def stem(self) -> str:
        return self._place.stem

    @property
    def suffix(self) -> str:
        return self._place.suffix

    @property
    def parent(self) -> "BucketPath":
        return BucketPath(self.scheme, self._place.parent)

    def __truediv__(self, other: str) -> "BucketPath":
        return BucketPath(self.scheme, self._place / other)

    def with_name(self, name: str) -> "BucketPath":
        return BucketPath(self.scheme, self._place.with_name(name))

    def relative_to(self, other: "BucketPath") -> pathlib.PurePosixPath:
        return self._place.relative_to(other._place)

    def absolute(self) -> "BucketPath":
        return self

    def __str__(self) -> str:
        return f"{self.scheme}://{self._place}"

    def __repr__(self) -> str:
        return f"BucketPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketPath) and str(self) == str(other)

    def __lt__(self, other: "BucketPath") -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    # -- the store; every method raises OSError --

    def exists(self) -> bool:
        with self._store() as store:
            return store.exists(str(self._place))

    def is_file(self) -> bool:
        with self._store() as store:
            return store.isfile(str(self._place))

    def is_dir(self) -> bool:
        with self._store() as store:
            return store.isdir(str(self._place))

    def iterdir(self) -> Iterator["BucketPath"]:
        """Yields the files and folders in this one. Raises FileNotFoundError if there are none."""
        for entry in self._listed():
            yield self / entry["name"].rstrip("/").rpartition("/")[2]

    def folders(self) -> list[str]:
        """Returns the names of the folders in this one. Raises FileNotFoundError if this one
        does not exist.
        """
        found = [entry["name"] for entry in self._listed() if entry["type"] == "directory"]
        return [name.rstrip("/").rpartition("/")[2] for name in found]

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yields the files and folders directly in this one whose names match a pattern."""
        with contextlib.suppress(FileNotFoundError):
            for path in self.iterdir():
                if fnmatch.fnmatchcase(path.name, pattern):
                    yield path

    def files_below(self) -> Iterator["BucketPath"]:
        """Yields every file below this folder, at any depth, sorted."""
        for name in sorted(self.sizes_below()):
            yield self / name

    def sizes_below(self) -> dict[str, int]:
        """Returns {path relative to this folder: bytes} of every file below it, from listings."""
        with self._store() as store:
            found = store.find(str(self._place), detail=True)
        # Names that end with "/" mark empty folders, as consoles create them.
        prefix = f"{self._place}/"
        return {
            name[len(prefix) :]: int(info["size"])
            for name, info in found.items()
            if name.startswith(prefix) and not name.endswith("/")
        }

    def version(self) -> ObjectVersion:
        with self._store() as store:
            found = store.info(str(self._place))
            if found["type"] != "file":
                raise IsADirectoryError(errno.EISDIR, "is a folder", str(self))
            changed = store.modified(str(self._place)).timestamp()
        tag = found.get("ETag") or found.get("etag") or found.get("md5Hash") or ""
        return ObjectVersion(int(found["size"]), changed, str(tag))

    def read_bytes(self) -> bytes:
        with self._store() as store:
            return store.cat_file(str(self._place))

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def read_range(self, start: int, count: int) -> bytes:
        """Reads `count` bytes from `start` on, or fewer at the end of the file."""
        with self._store() as store:
            return (
                store.cat_file(str(self._place), start=start, end=start + count) if count else b""
            )

    def write_bytes(self, content: bytes) -> None:
        """Writes a file atomically, replacing an existing one."""
        with self._store() as store:
            store.pipe_file(str(self._place), content)

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def create(self, content: bytes) -> bool:
        """Creates a file if it does not exist; returns whether it did: only one writer can."""
        try:
            with self._store() as store:
                store.pipe_file(str(self._place), content, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            response = getattr(error.__cause__, "response", None) or {}
            if response.get("Error", {}).get("Code") in _TAKEN:
                return False
            raise
        return True

    def upload(self, file: pathlib.Path) -> None:
        """Copies a file from a disk to this path, in parts but atomically."""
        with self._store() as store:
            store.put_file(str(file), str(self._place))

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with self._store() as store:
                store.rm_file(str(self._place))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self) -> None:
        """Removes everything below this path. Raises FileNotFoundError if there is nothing."""
        with self._store() as store:
            store.rm(str(self._place), recursive=True)

    def _listed(self) -> list[dict[str, Any]]:
        with self._store() as store:
            found = store.ls(str(self._place), detail=True)
        # A folder's own marker object is listed together with its content.
        return [entry for entry in found if entry["name"].strip("/") != str(self._place)]

    @contextlib.contextmanager
    def _store(self) -> Iterator[Any]:
        """Yields the store's file system; converts exceptions of its libraries to OSError."""
        try:
            yield file_system(self.scheme)
        except OSError:
            raise
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in STORE_LIBRARIES:
                raise
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise OSError(errno.EIO, said, str(self)) from error


@functools.cache
def file_system(scheme: str) -> Any:
    """Returns the fsspec file system of a scheme, "gs" or "s3"."""
    import fsspec

    return fsspec.filesystem(scheme, use_listings_cache=False)


_reached: set[tuple[str, str]] = set()


def require_reachable(path: BucketPath) -> None:
    """Checks access to a bucket, the first time that a path in it is used.

    Raises: UserError where access is denied; StorageError where the store does not answer at
      the moment.
    """
    if (path.scheme, path.bucket) in _reached:
        return
    name = f"{path.scheme}://{path.bucket}"
    try:
        file_system(path.scheme).exists(f"{path.bucket}/{path.key}")
    except PermissionError as error:
        raise UserError(f"{name} lets this machine not in ({error}): see to its rights") from None
    except OSError as error:
        raise StorageError(f"{name} cannot be reached just now ({error}): start again") from error
    except Exception as error:  # noqa: BLE001 - of credentials, endpoints and regions
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{name} cannot be reached ({said}): log in as the store's own tools want it, and look"
            " at the bucket's name"
        ) from error
    _reached.add((path.scheme, path.bucket))
