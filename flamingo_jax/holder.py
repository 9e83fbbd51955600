"""One process at a time works in a folder: a build in its output, a run in its workdir."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
from collections.abc import Iterator

from flamingo_jax.errors import UserError

HOLDER_FILE = ".holder"
MAX_BYTES = 4096
"""Of a holder file that are read."""


@contextlib.contextmanager
def holding(folder: pathlib.Path, work: str) -> Iterator[None]:
    """Holds the folder for as long as the block lasts.

    One that is not there is made, and removed again where nothing was put into it.

    `work` says what is done, as in "a build": whoever comes meanwhile is told it, with the
    holder's host and process, in a UserError. The lock is the kernel's (flock, which NFS carries
    to other hosts), so that a holder that was killed holds nothing.
    """
    file = folder / HOLDER_FILE
    made = not folder.exists()
    descriptor = _locked(file, folder)
    try:
        about = {"host": socket.gethostname(), "pid": os.getpid(), "work": work}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(about).encode(), 0)
        yield
    finally:
        # Removed while the lock is still held: whoever opened this file takes it for a stale one.
        with contextlib.suppress(OSError):
            file.unlink()
            if made:
                folder.rmdir()
        os.close(descriptor)


def _locked(file: pathlib.Path, folder: pathlib.Path) -> int:
    """The file, open and locked, as a descriptor that child programs do not inherit."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # The holder before removed the empty folder in between.
            continue
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written to ({error.strerror}): name another folder"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                logging.warning("%s: nothing keeps two processes apart here (%s)", folder, error)
                return descriptor
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(
                f"{folder} is held by {holder}: wait until that has ended, or name another folder"
            ) from None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        os.close(descriptor)  # The holder before removed it in between.


def _holder(descriptor: int) -> str:
    """Who wrote the file, in words."""
    try:
        about = json.loads(os.pread(descriptor, MAX_BYTES, 0))
        return f"{about['work']} (process {about['pid']} on {about['host']})"
    except (OSError, ValueError, TypeError, KeyError):  # It has just been opened.
        return "another process that has just started"
