"""JSON-lines files that a run appends to, such as metrics.jsonl, on a disk or in a bucket.

On a disk each line is written at once. Objects in a bucket cannot be appended to: there the
lines are in parts, `metrics.jsonl`, `metrics.1.jsonl`, `metrics.2.jsonl`, ..., of which only
the last is rewritten, at most every `UPLOAD_SECONDS` and when the file is closed. So the cost
of a line is bounded, whatever the length of the run. A run that is killed loses the lines of
the last seconds; a resumed run writes them again, since lines before a checkpoint are uploaded
before it (`flush`).
"""

import json
import logging
import pathlib
import threading
import time
from typing import Any, Protocol

from flamingo_jax import paths
from flamingo_jax.checkpointing.manifest import retry_read

log = logging.getLogger(__name__)

UPLOAD_SECONDS = 15.0
PART_BYTES = 4 << 20
"""Size at which a part is complete and a new one is begun."""


class LineWriter(Protocol):
    """A file that lines are appended to."""

    def write(self, text: str, /) -> Any:
        """Appends a line, including its newline."""

    def flush(self) -> None:
        """Writes buffered lines to the storage."""

    def close(self) -> None:
        """Writes buffered lines to the storage, and closes the file."""


def reopen(path: pathlib.Path, kept: list[dict[str, Any]]) -> LineWriter:
    """Replaces the file's content by the lines `kept`, and opens it for appending. On a disk
    the replacement is atomic.
    """
    lines = [json.dumps(line) + "\n" for line in kept]
    if paths.is_bucket(path):
        return BucketLines(path, lines)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(lines))
    temporary.replace(path)
    return path.open("a", buffering=1)


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the lines of a file; none if it does not exist. A truncated last line, as of a
    killed process, is dropped.

    Raises: OSError where reading fails at the moment: taken for an empty file, its content
      would be lost when it is reopened.
    """
    lines = []
    for content in _contents(path):
        for line in content.decode().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                return lines
    return lines


def read_bytes(path: pathlib.Path) -> bytes:
    """Reads a whole file, its parts concatenated. Raises OSError."""
    return b"".join(_contents(path))


class BucketLines:
    """A JSON-lines file in a bucket, which a thread uploads part by part.

    A failed upload is retried at the next; `close` raises the OSError of the last attempt.
    """

    def __init__(self, path: pathlib.Path, kept: list[str]):
        self._path, self._number = path, 0
        self._lines: list[str] = []
        self._bytes = 0
        self._unsaved = True
        self._lock, self._uploading = threading.Lock(), threading.Lock()
        self._stop = threading.Event()
        parts = _group(kept)
        before = _count(path)
        for text in parts[:-1]:
            _part(path, self._number).write_text(text)
            self._number += 1
        self._lines, self._bytes = [parts[-1]], len(parts[-1])
        self._upload()
        # Surplus parts are removed last: a kill in between leaves lines of an earlier start,
        # which the next start removes, but loses none.
        for number in range(self._number + 1, before):
            _part(path, number).unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._run, daemon=True, name=path.name)
        self._thread.start()

    def write(self, text: str) -> None:
        with self._lock:
            self._lines.append(text)
            self._bytes += len(text)
            self._unsaved = True

    def flush(self) -> None:
        self._upload()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._upload()

    def _run(self) -> None:
        """Runs in the thread: uploads new lines periodically."""
        while not self._stop.wait(UPLOAD_SECONDS):
            began = time.monotonic()
            try:
                self._upload()
            except OSError as error:
                log.warning(
                    "%s could not be written (%s, after %.1f s): it is tried again",
                    self._path,
                    error,
                    time.monotonic() - began,
                )

    def _upload(self) -> None:
        """Writes the last part, if it has new lines; begins a new part once it is full."""
        # Two locks, so that `write` does not wait for an upload.
        with self._uploading:
            with self._lock:
                if not self._unsaved:
                    return
                text, count, number = "".join(self._lines), len(self._lines), self._number
                full = self._bytes >= PART_BYTES
                self._unsaved = False
            try:
                _part(self._path, number).write_text(text)
            except OSError:
                self._unsaved = True
                raise
            if full:
                with self._lock:
                    del self._lines[:count]
                    self._bytes, self._number = sum(map(len, self._lines)), number + 1


def _part(path: pathlib.Path, number: int) -> pathlib.Path:
    return path if number == 0 else path.with_name(f"{path.stem}.{number}{path.suffix}")


def _group(lines: list[str]) -> list[str]:
    """Groups lines to parts of about `PART_BYTES`, at least one part."""
    parts: list[list[str]] = [[]]
    size = 0
    for line in lines:
        if size >= PART_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(line)
        size += len(line)
    return ["".join(part) for part in parts]


def _count(path: pathlib.Path) -> int:
    number = 0
    while _part(path, number).exists():
        number += 1
    return number


def _contents(path: pathlib.Path) -> list[bytes]:
    """Reads the content of each part; an empty list if the file does not exist."""
    found: list[bytes] = []
    while True:
        try:
            found.append(retry_read(_part(path, len(found)).read_bytes))
        except FileNotFoundError:
            return found
        if not paths.is_bucket(path):
            return found
