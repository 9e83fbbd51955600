"""Files below the folders that a source was given: the one way in which all sources find them.

Nothing outside those folders is read, whatever the data say, since data of others may name any
file of the machine or hold links to it:

- A name is taken below its folder, and `..` leads no higher than that.
- A link is followed where it leads to what lies below one of the folders given: that could have
  been read without it. A link that leads elsewhere is refused and counted; whoever made it
  himself gives the folder that it leads to as an input, or copies.
- A folder within a cache of Hugging Face's hub, `REPOSITORY/snapshots/REVISION`, holds links to
  `REPOSITORY/blobs`, where hub clients keep nothing but that repository's files: these are
  read.

Names are found however they are spelled: composed or decomposed characters (macOS writes the
latter), and backslashes between folders where no file has one in its name.
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

from data_pipelines.build.images import UNREADABLE, Unfit
from flamingo_jax.errors import UserError
from flamingo_jax.storage import LASTING, read_with_retries

MISSING = "missing"
OUTSIDE = "outside the folder"
LINKED = "link that leads outside the folder"
LINKED_FOLDER = "linked folder that lies outside the folder"
UNLISTED = "folder that cannot be listed"
NOT_A_FILE = "not a file"
MAX_BYTES = 256 << 20
"""A larger file is no image, no caption and no page."""
TOO_LARGE = f"larger than {MAX_BYTES >> 20} MiB"

FILLERS = ("__MACOSX",)
"""Folders that macOS adds to archives, with a stub for each file."""
HUB_REPOSITORY = re.compile(r"(?:models|datasets|spaces)--.")


class NoFile(Unfit):
    """There is no such file that may be read; the message is the reason."""


class RefusedPath(NamedTuple):
    """A file or folder that a walk met and that is not read. name: below the folder walked."""

    name: str
    reason: str
    is_folder: bool = False


@dataclasses.dataclass(frozen=True)
class Listing:
    """Names of the files below a folder, parted by "/", in the order of their parts."""

    names: tuple[str, ...]
    refused: tuple[RefusedPath, ...] = ()

    def ending(self, suffixes: Iterable[str]) -> "Listing":
        """The files that end in one of these, in any case, and whatever else was refused."""
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
    """Returns the folder's path. Raises UserError where the folder is not there, which `flag`
    names.
    """
    path = pathlib.Path(folder)
    if not path.is_dir():
        raise UserError(f"there is no folder {path}: mend {flag}")
    return path


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """A file below one of a source's folders, or what is not read there: `bad` says why."""

    folder: str
    name: str
    bad: str = ""

    def __str__(self) -> str:
        return self.name


def file_entries(folders: Sequence[str], suffixes: Iterable[str], what: str) -> list[FileEntry]:
    """Lists every file of these suffixes below the folders. Raises UserError where there is
    none.
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
    """Lists all files below a folder that may be read, with the suffixes where there are some.

    Hidden files and folders (`.name`) are no data. Each folder is listed once, under its own
    name if it has one below `folder`, however many links lead to it. given: the other folders
    of the source; links to folders there are passed over, as these are listed themselves.
    """
    root = str(folder)
    own, places = _inside((root,)), _inside((root, *given))
    names: list[str] = []
    refused: list[RefusedPath] = []
    folders, links, seen = [""], list[str](), set[str]()
    while folders or links:
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
    """Finds the file of that name below the first of the folders that has one.

    given: other folders that links may lead to. Raises NoFile.
    """
    places = _inside((*folders, *given))
    reasons = []
    for folder in folders:
        for spelling in spellings(name):
            path, reason = _look(str(folder), spelling, places)
            if reason is None:
                return pathlib.Path(path)
            reasons.append(reason)
    raise NoFile(next((reason for reason in reasons if reason != MISSING), MISSING))


def read(path: str | pathlib.Path, most: int = MAX_BYTES, too_large: str = TOO_LARGE) -> bytes:
    """Reads a file that was found, of at most so many bytes; too_large is the reason where it
    has more.

    Raises NoFile; StorageError where the storage fails for long.
    """

    def load() -> bytes | None:
        with open(path, "rb") as file:
            return file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None

    try:
        data = read_with_retries(load, path, LASTING)
    except OSError as error:
        raise NoFile(UNREADABLE) from error
    if data is None or len(data) > most:
        raise NoFile(too_large)
    return data


class NameResolver:
    """Finds the one name of each file of a listing, so that all that is said of a file comes
    together.
    """

    def __init__(self, root: str | pathlib.Path, names: Iterable[str]):
        self._root = str(root)
        self._names = frozenset(names)
        self._composed: dict[str, str] = {}
        for name in sorted(self._names):
            if not name.isascii():
                self._composed.setdefault(composed(name), name)

    def __call__(self, written: str) -> str:
        """The file's own name; for a name that no file of the listing has, one way of writing
        it.

        Raises TypeError for what is no text.
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
    """Yields the name as it is written, and with "/" for the backslashes of Windows."""
    yield name
    if "\\" in name:
        yield name.replace("\\", "/")


def relative(name: str, root: str | pathlib.Path) -> str:
    """Returns a name with folders, absolute or not, as the path below `root`, without `.` and
    `a/..`.

    It begins with `..` where it leads out of `root`. The name's own last part may be a link:
    that is not followed.
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
    """Returns the name in Unicode's NFC."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


class _Inside:
    """Whether a real path lies in one of the places that may be read."""

    def __init__(self, places: Iterable[str]):
        self._starts = tuple(dict.fromkeys(os.path.join(place, "") for place in places))

    def __call__(self, real: str) -> bool:
        return os.path.join(real, "").startswith(self._starts)


def _inside(folders: Iterable[str | pathlib.Path]) -> _Inside:
    return _Inside(place for folder in folders for place in _places(os.path.realpath(folder)))


@functools.lru_cache(maxsize=64)
def _places(real: str) -> tuple[str, ...]:
    """A folder, and the blobs of the repository in whose snapshot it is."""
    parts = pathlib.PurePath(real).parts
    blobs = [
        os.path.join(*parts[:place], "blobs")
        for place in range(1, len(parts))
        if parts[place] == "snapshots" and HUB_REPOSITORY.match(parts[place - 1])
    ]
    return real, *blobs


def _look(root: str, name: str, places: _Inside) -> tuple[str, str | None]:
    """The path of a name below `root`, and None; or why it is not read."""
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
    """None where there is a file that may be read, links followed."""
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
    """The path whose parts are the same characters, composed or not, in the form it has on
    disk.
    """
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
    """Names in a folder beyond ASCII by their composed form. changed: the folder's time stamp."""
    names = sorted(name for name in os.listdir(folder) if not name.isascii())
    return {composed(name): name for name in reversed(names)}
