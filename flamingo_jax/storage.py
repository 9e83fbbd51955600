"""Reading from storage that may fail for a moment: which errors are the storage's, reading
again, and how many files may be open.
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
"""Seconds before each further attempt at reading: a server that fails over for longer ends the
run, and launchers start it again.
"""
OPEN_FILES = 65_536
"""What the limit of open files is raised to, where the system allows it: shards, caches and
sockets need no more.
"""
TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)
LASTING = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ENXIO),
)
"""Errors that a file of someone's folder keeps: it is not there, or nobody may read it."""

_SYSTEM_CALL = re.compile(r"\b\w+\(\) failed: ([^;]+)")
"""How Riegeli, and so array_record, tells of a system call: `pread() failed: Input/output
error; reading PATH; at byte 0`.
"""


def storage_failure(error: BaseException) -> OSError | None:
    """Finds the failure of the storage behind an error of reading; None where what was read is
    wrong, or the caller's doing.

    An OSError with a number (EIO, ESTALE, EMFILE, ...), a timeout and a lost connection say
    nothing about the bytes on disk, which may be read well the next time. Damage is what is
    left: checksums that differ, a file that is cut short, fields that are missing. PIL, gzip
    and others raise OSErrors without a number for it.
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
    """Returns what `read` does; after an error that may pass it is called again, behind each
    of these seconds.

    passes: of an error and the seconds before the next attempt, whether to wait for it. Raises
    what may not pass at once, and whatever the last attempt raises.
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
    """Returns what `read` does; where the storage fails it is called again, after ever longer waits
    (`WAITS`).

    Args:
      what: names what is read, for the log.
      at_once: numbers of errors that are not waited for, such as `LASTING`.

    Raises:
      StorageError: it failed each time. Launchers start such a run again.
      Exception: whatever else `read` raises, at once.
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
    """Finds the storage's failure behind an error, where it is one that is waited for."""
    failure = storage_failure(error)
    return None if failure is None or failure.errno in at_once else failure


def _reason(failure: OSError) -> str:
    return failure.strerror or str(failure) or type(failure).__name__


def modified(path: pathlib.Path) -> float | None:
    """Tells when a file or folder was last written, in seconds; None where there is none.

    That it cannot be told just now is no None, as it is of `Path.exists` in some versions of
    Python, but read again (see `read_with_retries`).
    """

    def look() -> float | None:
        try:
            return path.stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None

    return read_with_retries(look, path)


def raise_open_files() -> None:
    """Raises the soft limit of open files towards `OPEN_FILES`, as far as the hard one allows:
    many systems begin with 1,024.
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
    """Tells how many files this process may have open."""
    if resource is None:
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_FILES if soft == resource.RLIM_INFINITY else soft
