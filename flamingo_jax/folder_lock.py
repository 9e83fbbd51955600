"""Locks a folder, so that one process at a time works in it: a build in its output, a run in
its workdir.

    <folder>/.holder-<n>    a `Lease` as JSON, which names the holder; renewed at each
    heartbeat

The file with the highest n is the valid one. A lease is expired if its process no longer
exists (on this machine) or has not renewed it for `LEASE_SECONDS` (on another one); whoever
then creates the next n holds the folder. This relies on exclusive creation of files, which
every file system guarantees, NFS included; flock is not visible to all hosts of some. In
buckets conditional writes do the same. Ages are measured by the storage's clock. Nothing needs
to be cleaned up after a process or host has died.
"""

import contextlib
import enum
import errno
import json
import logging
import os
import pathlib
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

from flamingo_jax import paths
from flamingo_jax.errors import EXIT_LOST, StorageError, UserError

log = logging.getLogger(__name__)

HEARTBEAT_EVERY = 5.0
"""Seconds between a holder's heartbeats."""
LEASE_SECONDS = 60.0
"""Seconds without a heartbeat after which a holder on another machine counts as dead. Network
storage may show another host's writes with a delay of 30 s.
"""
LOOK_EVERY = 0.5
"""Seconds between two looks at another process's lease."""
MOST_BYTES = 1 << 12
"""The most bytes of a lease file that are read."""
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
"""Errors that a second attempt would not change."""
PREFIX = ".holder-"
_NAME = re.compile(re.escape(PREFIX) + "([1-9][0-9]{0,8})")


class FolderLockedError(UserError):
    """Another process holds the folder."""


class Lease(NamedTuple):
    """Who holds a folder, and for what work.

    machine: the boot id and pid namespace, within which `pid` is meaningful.
    began: when the process started, to tell it from a later one with the same pid; "" where
      unknown.
    folder: its path on that machine, so that a copy of the folder is not locked.
    token: random, unique to the lease.
    """

    work: str
    host: str
    pid: int
    machine: str
    began: str
    folder: str
    token: str


class LeaseState(enum.Enum):
    """Whether an existing lease keeps other processes out."""

    HELD = "held"
    FREE = "free"
    UNKNOWN = "unknown"
    """It must be watched: a heartbeat means that it is held, silence that it is free."""


def lease_state(runs: bool | None, silent: float, beaten: bool) -> LeaseState:
    """Decides whether an existing lease keeps other processes out.

    Args:
      runs: whether its process still runs; None if that cannot be seen from this machine.
      silent: seconds since its last heartbeat, by the storage's clock.
      beaten: whether a heartbeat has been seen since it was first looked at.
    """
    if runs is not None:
        return LeaseState.HELD if runs else LeaseState.FREE
    if beaten:
        return LeaseState.HELD
    return LeaseState.FREE if silent > LEASE_SECONDS else LeaseState.UNKNOWN


class LeaseFile(NamedTuple):
    """A lease file as it was read: its number, the lease (None if it is not written yet), and
    its modification time in seconds.
    """

    number: int
    lease: Lease | None
    changed: float


@contextlib.contextmanager
def lock_folder(folder: pathlib.Path, work: str) -> Iterator[None]:
    """Locks the folder while the context is active: see `FolderLock`."""
    folder_lock = FolderLock(folder, work)
    try:
        yield
    finally:
        folder_lock.release()


class FolderLock:
    """Locks a folder for this process until `release`; a thread renews the lease.

    Args:
      folder: created if it does not exist.
      work: what this process does there, such as "a build", for the error message of others.
      lost: called when another process has taken the folder, which can happen if this one was
        suspended for longer than `LEASE_SECONDS`; it must not write there any more. By default
        ends the process at once.

    Raises: FolderLockedError where another process holds it; UserError where it cannot be
      written to.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        work: str,
        lost: Callable[[pathlib.Path], None] | None = None,
    ):
        self._folder, self._lost = folder, lost or _end
        self._lease = Lease(
            work,
            socket.gethostname(),
            os.getpid(),
            _machine(),
            _began(os.getpid()),
            str(folder) if paths.is_bucket(folder) else os.path.realpath(folder),
            uuid.uuid4().hex,
        )
        try:
            self._made = not paths.is_bucket(folder) and not folder.exists()
            self._path = self._take()
        except OSError as error:
            raise _failed(folder, error) from error
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, daemon=True, name="folder-lock")
        self._thread.start()

    def release(self) -> None:
        """Releases the lock. A folder that this lock created is removed again if it is empty."""
        self._stop.set()
        # With a timeout: the thread may be stuck on storage that does not answer.
        self._thread.join(HEARTBEAT_EVERY)
        with contextlib.suppress(OSError):
            found = _read(self._path)
            if found is not None and found.lease == self._lease:
                self._path.unlink()
            if self._made:
                self._folder.rmdir()

    def _take(self) -> pathlib.Path:
        """Waits until any existing lease is held or expired, and creates the next one; returns
        its file.

        Raises: FolderLockedError where another process holds the folder.
        """
        first: LeaseFile | None = None
        while True:
            paths.make_folder(self._folder)
            try:
                seen, found = _numbers(self._folder), _newest(self._folder)
                if found is not None and not self._is_free(found, first):
                    if first is None or first.number != found.number:
                        first = found
                        log.info(
                            "%s: looking whether %s still runs, for at most %.0f s",
                            self._folder,
                            _who(found.lease),
                            LEASE_SECONDS,
                        )
                    time.sleep(LOOK_EVERY)
                    continue
                number = found.number + 1 if found else 1
                path = self._folder / f"{PREFIX}{number}"
                if not _make(path, self._lease):
                    continue
                others = set(_numbers(self._folder)) - {number}
                if others - set(seen) or max(others, default=0) > number:
                    # Another process has created a lease at the same time: start over, and
                    # look at that one.
                    path.unlink()
                    continue
            except FileNotFoundError:
                if paths.is_bucket(self._folder):
                    raise
                # The previous holder has removed the empty folder.
                time.sleep(0.001)
                continue
            # Not by number alone: a holder that released meanwhile may have had the same one.
            for other in others:
                (self._folder / f"{PREFIX}{other}").unlink(missing_ok=True)
            return path

    def _is_free(self, found: LeaseFile, first: LeaseFile | None) -> bool:
        """Returns whether a lease has expired; False while that is still to be seen.

        first: the same lease as it was when first read, to notice heartbeats.
        Raises: FolderLockedError where it is held.
        """
        runs = self._runs(found.lease)
        beaten = (
            first is not None and first.number == found.number and first.changed != found.changed
        )
        state = lease_state(runs, self._now() - found.changed if runs is None else 0.0, beaten)
        if state is LeaseState.HELD:
            mend = "wait until that has ended, or name another folder"
            raise FolderLockedError(f"{self._folder} is held by {_who(found.lease)}: {mend}")
        return state is LeaseState.FREE

    def _runs(self, lease: Lease | None) -> bool | None:
        """Returns whether a lease's process runs; None where it is not on this machine."""
        if (
            lease is None
            or lease.machine != self._lease.machine
            or lease.folder != self._lease.folder
        ):
            return None
        return _is_running(lease.pid, lease.began)

    def _now(self) -> float:
        """Returns the time by the storage's clock: the modification time of a file that is
        written now. The hosts' own clocks may differ.
        """
        path = self._folder / f"{PREFIX}clock-{self._lease.token}"
        if paths.is_bucket(path):
            path.write_bytes(b"?")
            now = paths.version(path).changed
            path.unlink()
            return now
        with open(path, "wb") as file:
            file.write(b"?")
            file.flush()
            now = os.fstat(file.fileno()).st_mtime
        path.unlink()
        return now

    def _heartbeat(self) -> None:
        while not self._stop.wait(HEARTBEAT_EVERY):
            # What fails for a moment is tried again with the next beat.
            with contextlib.suppress(OSError):
                found = _newest(self._folder)
                if found is None:
                    # Somebody tidied up.
                    _make(self._path, self._lease)
                elif found.lease == self._lease:
                    _renew(self._path, self._lease)
                elif not self._stop.is_set():
                    return self._lost(self._folder)


def _who(lease: Lease | None) -> str:
    if lease is None:
        return "another process that has just started"
    return f"{lease.work} (process {lease.pid} on {lease.host})"


def _failed(folder: pathlib.Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"there is no bucket for {folder}: make it, or name another")
    if error.errno in _REFUSED or isinstance(error, PermissionError):
        return UserError(f"{folder} cannot be written to ({error.strerror}): name another folder")
    why = f"{folder} cannot be written to just now ({error.strerror})"
    return StorageError(f"{why}: mend the storage and start again")


def _end(folder: pathlib.Path) -> None:
    """Ends this process at once (no cleanup, which might write to the folder)."""
    found = None
    with contextlib.suppress(OSError):  # It ends even if the new holder cannot be read.
        found = _newest(folder)
    who = _who(found.lease if found else None)
    print(
        f"error: {folder} was taken by {who} while this process stood still: see how that does",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_LOST)


# -- the files --


def _number(name: str) -> int:
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else 0


def _numbers(folder: pathlib.Path) -> list[int]:
    if paths.is_bucket(folder):
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
    else:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries]
    return sorted(number for name in names if (number := _number(name)))


def _newest(folder: pathlib.Path) -> LeaseFile | None:
    for number in reversed(_numbers(folder)):
        if (found := _read(folder / f"{PREFIX}{number}")) is not None:
            return found
    return None


def _read(path: pathlib.Path) -> LeaseFile | None:
    """Reads a lease file; None where it does not exist (any more)."""
    try:
        if paths.is_bucket(path):
            text, changed = path.read_bytes()[:MOST_BYTES], paths.version(path).changed
        else:
            # Opening a file makes NFS refresh its cached attributes.
            with open(path, "rb") as file:
                text, changed = file.read(MOST_BYTES), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    lease = None
    with contextlib.suppress(ValueError, TypeError):
        raw = Lease(**json.loads(text))
        if isinstance(raw.pid, int) and all(
            isinstance(value, str) for value in raw if value is not raw.pid
        ):
            lease = raw
    return LeaseFile(_number(path.name), lease, changed)


def _make(path: pathlib.Path, lease: Lease) -> bool:
    """Creates a lease file; returns whether this process did: only one can."""
    return paths.create(path, _text(lease))


def _renew(path: pathlib.Path, lease: Lease) -> None:
    """Renews a lease, by its modification time. Raises OSError."""
    if paths.is_bucket(path):
        path.write_bytes(_text(lease))
    else:
        os.utime(path)


def _text(lease: Lease) -> bytes:
    return json.dumps(lease._asdict()).encode()


# -- processes --


def _machine() -> str:
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _state(pid: int) -> tuple[str, str] | None:
    """Returns a process's state and start time from /proc; None where the system has none."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name in parentheses may contain anything, spaces and parentheses too.
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]


def _began(pid: int) -> str:
    state = _state(pid)
    return "" if state is None else state[1]


def _is_running(pid: int, began: str) -> bool | None:
    """Returns whether a process runs; None where a process has this pid, but its start time is
    not known.
    """
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    state = _state(pid)
    if state is None or not began:
        return None
    return state[0] not in "ZX" and state[1] == began
