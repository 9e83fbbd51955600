"""Finds and reads files below a source's input folders; all sources use this, for safety.

Data from others may name any file of the machine or contain links to it, so nothing outside
the input folders is read:

- Names are relative to their folder; names that `..` leads out of it are refused.
- Symbolic links are followed only to files below one of the input folders, which could be read
  anyway. Other links are refused and counted; to use their targets, pass these as inputs or
  copy them.
- In a cache of the Hugging Face hub, `REPOSITORY/snapshots/REVISION` consists of links to
  `REPOSITORY/blobs`, which holds that repository's files alone: these links are followed.

Names match in any Unicode normalisation (macOS decomposes characters), and with backslashes
for slashes where no file has a backslash in its name.
"""

import dataclasses
import functools
import os
import pathlib
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from data_pipelines.build.images import UNREADABLE, UnusableImage
from flamingo_jax.errors import UserError
from flamingo_jax.storage import LASTING, read_with_retries

MISSING = "missing"
OUTSIDE = "outside the folder"
LINKED = "link that leads outside the folder"
LINKED_FOLDER = "linked folder that lies outside the folder"
UNLISTED = "folder that cannot be listed"
NOT_A_FILE = "not a file"
MAX_BYTES = 256 << 20
"""Larger files are not read: they are not images, captions or pages."""
TOO_LARGE = f"larger than {MAX_BYTES >> 20} MiB"

FILLERS = ("__MACOSX",)
"""Folders that macOS adds to archives, with a metadata stub for each file."""
HUB_REPOSITORY = re.compile(r"(?:models|datasets|spaces)--.")
"""Matches a repository's folder in a cache of the Hugging Face hub."""


class FileRefused(UnusableImage):
    """Raised where a file does not exist or may not be read; the message is the reason."""


class RefusedPath(NamedTuple):
    """A file or folder that `walk` found but that is not read; name: relative to its root."""

    name: str
    reason: str
    is_folder: bool = False


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files below a folder: names relative to it with "/", sorted by their parts."""

    names: tuple[str, ...]
    refused: tuple[RefusedPath, ...] = ()

    def ending(self, suffixes: Iterable[str]) -> "Listing":
        """Returns the files with one of these suffixes (any case), and refused folders."""
        ends = tuple(suffixes)
        return Listing(
            tuple(name for name in self.names if name.lower().endswith(ends)),
            tuple(
                refused
                for refused in self.refused
                if refused.is_folder or refused.name.lower().endswith(ends)
            ),
        )


def existing_folder(folder: str | pathlib.Path, flag: str = "--input") -> pathlib.Path:
    """Returns the folder's path; raises UserError, which mentions `flag`, if it does not
    exist.
    """
    path = pathlib.Path(folder)
    if not path.is_dir():
        raise UserError(f"there is no folder {path}: mend {flag}")
    return path


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """A file below an input folder; `bad` is the reason why it is not read, "" if it is."""

    folder: str
    name: str
    bad: str = ""

    def __str__(self) -> str:
        return self.name


def file_entries(folders: Sequence[str], suffixes: Iterable[str], what: str) -> list[FileEntry]:
    """Lists the files with these suffixes below the folders; raises UserError if there are
    none.

    what: the files' description in that error.
    """
    found = []
    for folder in folders:
        listing = walk(existing_folder(folder), suffixes, folders)
        found += [FileEntry(folder, name) for name in listing.names]
        found += [FileEntry(folder, refused.name, refused.reason) for refused in listing.refused]
    if not found:
        raise UserError(f"there is no {what} below {', '.join(folders)}: mend --input")
    return found


def walk(
    folder: str | pathlib.Path, suffixes: Iterable[str] = (), given: Sequence[str] = ()
) -> Listing:
    """Lists the files below a folder, with these suffixes if there are any, and what is
    refused.

    Hidden files and folders (`.name`) are skipped. Each folder is listed once however many
    links lead to it, under its real name where that is below `folder`.

    given: the source's other input folders. Links to folders in them are skipped, since these
      are listed themselves.
    """
    root = str(folder)
    own, places = _inside((root,)), _inside((root, *given))
    names: list[str] = []
    refused: list[RefusedPath] = []
    folders, links, seen = [""], list[str](), set[str]()
    while folders or links:
        # Linked folders come last, so that a folder is listed under its real name if it has
        # one.
        here = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(os.path.join(root, here))
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = read_with_retries(functools.partial(_entries, real), real, LASTING)
        except OSError:
            refused.append(RefusedPath(here or ".", UNLISTED, is_folder=True))
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name in FILLERS:
                continue
            name = f"{here}/{entry.name}" if here else entry.name
            if not entry.is_symlink():
                if entry.is_dir():
                    folders.append(name)
                elif entry.is_file():
                    names.append(name)
                else:
                    refused.append(RefusedPath(name, NOT_A_FILE))
                continue
            target = os.path.realpath(entry.path)
            if not os.path.isdir(target):
                reason = _why_not(entry.path, places)
                refused += [RefusedPath(name, reason)] if reason else []
                names += [] if reason else [name]
            elif own(target):
                links.append(name)
            elif not places(target):
                refused.append(RefusedPath(name, LINKED_FOLDER, is_folder=True))
    names.sort(key=lambda name: name.split("/"))
    found = Listing(tuple(names), tuple(sorted(refused)))
    return found.ending(suffixes) if suffixes else found


def _entries(folder: str) -> list["os.DirEntry[str]"]:
    with os.scandir(folder) as opened:
        return sorted(opened, key=lambda entry: entry.name)


def find(
    folders: Sequence[str | pathlib.Path], name: str, given: Sequence[str] = ()
) -> pathlib.Path:
    """Finds a file by name in the first of the folders that has it.

    given: other folders that links may lead to.
    Raises: FileRefused with the reason.
    """
    places = _inside((*folders, *given))
    reasons = []
    for folder in folders:
        for spelling in spellings(name):
            path, reason = _look(str(folder), spelling, places)
            if reason is None:
                return pathlib.Path(path)
            reasons.append(reason)
    raise FileRefused(next((reason for reason in reasons if reason != MISSING), MISSING))


def read(path: str | pathlib.Path, most: int = MAX_BYTES, too_large: str = TOO_LARGE) -> bytes:
    """Reads a file of at most `most` bytes.

    Raises: FileRefused with the reason, `too_large` for a larger file; StorageError where the
      storage kept failing.
    """

    def load() -> bytes | None:
        with open(path, "rb") as file:
            return file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None

    try:
        data = read_with_retries(load, path, LASTING)
    except OSError as error:
        raise FileRefused(UNREADABLE) from error
    if data is None or len(data) > most:
        raise FileRefused(too_large)
    return data


class NameResolver:
    """Maps the spellings of a file's name to its name in a listing, so that captions of one
    file under several spellings are joined.
    """

    def __init__(self, root: str | pathlib.Path, names: Iterable[str]):
        self._root = str(root)
        self._names = frozenset(names)
        self._composed: dict[str, str] = {}
        for name in sorted(self._names):
            if not name.isascii():
                self._composed.setdefault(composed(name), name)

    def __call__(self, written: str) -> str:
        """Returns the file's name in the listing; a normalised spelling if it is not in there.

        Raises: TypeError for a value that is not a string.
        """
        if not isinstance(written, str):
            raise TypeError("a name must be a text")
        ways = [relative(way, self._root) for way in spellings(written)]
        for way in ways:
            if way in self._names:
                return way
            if (own := self._composed.get(composed(way))) is not None:
                return own
        return composed(ways[-1])


def spellings(name: str) -> Iterator[str]:
    """Yields the name as written, then with Windows' backslashes replaced by "/"."""
    yield name
    if "\\" in name:
        yield name.replace("\\", "/")


def relative(name: str, root: str | pathlib.Path) -> str:
    """Normalises a path, absolute or relative to `root`, to one relative to `root`.

    The result begins with `..` if the path leads out of `root`. If the last part is a link, it
    is not followed.
    """
    if not os.path.isabs(name):
        return os.path.normpath(name)
    name = os.path.normpath(name)
    below = os.path.relpath(name, os.path.abspath(root))
    if below.split("/", 1)[0] != "..":
        return below
    try:
        folder = os.path.realpath(os.path.dirname(name))
    except (OSError, ValueError):
        return below
    return os.path.relpath(os.path.join(folder, os.path.basename(name)), os.path.realpath(root))


def composed(name: str) -> str:
    """Normalises a name to composed characters (Unicode NFC)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


class _Inside:
    """Tests whether a real path (without links) is below one of the allowed folders."""

    def __init__(self, places: Iterable[str]):
        self._starts = tuple(dict.fromkeys(os.path.join(place, "") for place in places))

    def __call__(self, real: str) -> bool:
        return os.path.join(real, "").startswith(self._starts)


def _inside(folders: Iterable[str | pathlib.Path]) -> _Inside:
    return _Inside(place for folder in folders for place in _places(os.path.realpath(folder)))


@functools.lru_cache(maxsize=64)
def _places(real: str) -> tuple[str, ...]:
    """Returns a folder and, for one in a snapshot of a Hugging Face cache, its blobs."""
    parts = pathlib.PurePath(real).parts
    blobs = [
        os.path.join(*parts[:place], "blobs")
        for place in range(1, len(parts))
        if parts[place] == "snapshots" and HUB_REPOSITORY.match(parts[place - 1])
    ]
    return real, *blobs


def _look(root: str, name: str, places: _Inside) -> tuple[str, str | None]:
    """Returns (path of a name below `root`, None), or (a path, the reason it is not read)."""
    if not name:
        return root, MISSING
    below = relative(name, root)
    if below.split("/", 1)[0] == "..":
        return root, OUTSIDE
    path = os.path.join(root, below)
    reason = _why_not(path, places)
    if reason == MISSING and not below.isascii() and (other := _in_other_form(root, below)):
        return other, _why_not(other, places)
    return path, reason


def _why_not(path: str, places: _Inside) -> str | None:
    """Returns None if a path, with links followed, may be read; otherwise the reason."""
    try:
        real = os.path.realpath(path)
        if not places(real):
            return LINKED
        mode = read_with_retries(lambda: os.stat(real).st_mode, real, LASTING)
        return None if stat.S_ISREG(mode) else NOT_A_FILE
    except PermissionError:
        return UNREADABLE
    except (OSError, ValueError):  # Too long, not in Unicode, links in a circle, not there.
        return MISSING


def _in_other_form(root: str, below: str) -> str | None:
    """Finds the path on disk that is equal after Unicode normalisation; None if none."""
    here = root
    for part in below.split("/"):
        try:
            if not os.path.lexists(os.path.join(here, part)):
                part = _forms(here, os.stat(here).st_mtime_ns)[composed(part)]
        except (OSError, ValueError, KeyError):
            return None
        here = os.path.join(here, part)
    return here


@functools.lru_cache(maxsize=64)
def _forms(folder: str, changed: int) -> dict[str, str]:
    """Returns {NFC name: name on disk} of a folder's non-ASCII names.

    changed: the folder's modification time, a key of the cache only.
    """
    names = sorted(name for name in os.listdir(folder) if not name.isascii())
    return {composed(name): name for name in reversed(names)}
