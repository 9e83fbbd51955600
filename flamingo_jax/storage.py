"""Reads from storage that may fail temporarily: distinguishes failures of the storage from
damaged data, retries, and raises the limit of open files.
"""

import errno
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

from flamingo_jax.errors import StorageError, UserError

try:
    import resource
except ImportError:  # Not on Windows, which knows no such limit.
    resource = None  # type: ignore[assignment]

T = TypeVar("T")

WAITS = (0.1, 0.5, 2.0, 8.0)
"""Seconds before each retry of a read. If a server is down for longer, the run ends, and
launchers restart it.
"""
OPEN_FILES = 65_536
"""The limit of open files to be set, where the system allows it: enough for shards, caches and
sockets.
"""
TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)
LASTING = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ENXIO),
)
"""Errors that do not go away by waiting: a file does not exist, or may not be read."""

_SYSTEM_CALL = re.compile(r"\b\w+\(\) failed: ([^;]+)")
"""Riegeli's (and so array_record's) message of a failed system call: `pread() failed:
Input/output error; reading PATH; at byte 0`.
"""


def storage_failure(error: BaseException) -> OSError | None:
    """Finds the storage failure that caused a read error; None where the data is damaged, or
    the error is the caller's.

    An OSError with an errno (EIO, ESTALE, EMFILE, ...), a timeout or a lost connection says
    nothing about the bytes on disk, which may be read correctly the next time. All else is
    damage: wrong checksums, truncated files, missing fields. PIL, gzip and others raise
    OSErrors without an errno for it.
    """
    if isinstance(error, UserError):
        return None
    if isinstance(error, (TimeoutError, ConnectionError)) or (
        isinstance(error, OSError) and error.errno is not None
    ):
        return error
    if isinstance(error, RuntimeError) and (told := _SYSTEM_CALL.search(str(error))):
        numbers = {os.strerror(number): number for number in errno.errorcode}
        return OSError(numbers.get(told[1].strip(), errno.EIO), told[1].strip())
    return storage_failure(error.__cause__) if error.__cause__ is not None else None


def retry(
    read: Callable[[], T], waits: Iterable[float], passes: Callable[[Exception, float], bool]
) -> T:
    """Calls `read` and returns its result; after an error that may be temporary, waits and
    calls it again, once for each of `waits` (seconds).

    passes: (error, seconds to wait) -> whether to retry.
    Raises: errors that are not to be retried, at once; and any error of the last attempt.
    """
    for wait in waits:
        try:
            return read()
        except Exception as error:
            if not passes(error, wait):
                raise
        time.sleep(wait)
    return read()


def read_with_retries(
    read: Callable[[], T], what: object, at_once: Collection[int | None] = ()
) -> T:
    """Calls `read` and returns its result; retries after storage failures, with increasing
    waits (`WAITS`).

    Args:
      what: describes what is read, for the log.
      at_once: errnos that are not retried, such as `LASTING`.

    Raises:
      StorageError: every attempt failed. Launchers restart such a run.
      Exception: any other error of `read`, at once.
    """

    def passes(error: Exception, wait: float) -> bool:
        failure = _failure_of(error, at_once)
        if failure is not None:
            logging.warning(
                "%s could not be read (%s): it is read again in %g s", what, _reason(failure), wait
            )
        return failure is not None

    try:
        return retry(read, WAITS, passes)
    except Exception as error:
        failure = _failure_of(error, at_once)
        if failure is None:
            raise
        mend = (
            "mend the storage"
            if failure.errno not in TOO_MANY_OPEN
            else "raise the limit of open files (ulimit -n)"
        )
        raise StorageError(
            f"{what} could not be read {len(WAITS) + 1} times over {sum(WAITS):.3g} s"
            f" ({_reason(failure)}): {mend} and start again; nothing is taken for damaged, and"
            " what was saved is whole"
        ) from error


def _failure_of(error: Exception, at_once: Collection[int | None]) -> OSError | None:
    """Finds the storage failure behind an error, if it is one to be retried."""
    failure = storage_failure(error)
    return None if failure is None or failure.errno in at_once else failure


def _reason(failure: OSError) -> str:
    return failure.strerror or str(failure) or type(failure).__name__


def modified(path: pathlib.Path) -> float | None:
    """Returns the modification time of a file or folder in seconds; None where it does not
    exist.

    Storage failures are retried (see `read_with_retries`), rather than taken for absence as by
    `Path.exists` in some versions of Python.
    """

    def look() -> float | None:
        try:
            return path.stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None

    return read_with_retries(look, path)


def raise_open_files() -> None:
    """Raises the soft limit of open files to `OPEN_FILES`, as far as the hard limit allows;
    its default is often 1,024.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        logging.info("the limit of open files stays at %d: %s", soft, error)


def open_files_allowed() -> int:
    """Returns how many files this process may have open."""
    if resource is None:
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_FILES if soft == resource.RLIM_INFINITY else soft
