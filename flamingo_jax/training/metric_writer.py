"""Writes what a run measured as JSON lines, cut back to the restored step on resume."""

import json
import pathlib
from typing import Any, TextIO

from flamingo_jax.checkpointing.manifest import retry_read


class MetricWriter:
    """Writes `<workdir>/metrics.jsonl`, one object a line. A disabled one writes nothing."""

    def __init__(self, workdir: pathlib.Path, *, resume_step: int, enabled: bool = True):
        self._file: TextIO | None = None
        if not enabled:
            return
        path = workdir / "metrics.jsonl"
        kept = [line for line in read_lines(path) if line["step"] <= resume_step]
        self._last = json.dumps(kept[-1]) if kept else ""
        self._file = reopen(path, kept)

    def write(self, step: int, values: dict[str, Any]) -> bool:
        """Writes JSON-able values at a step, and tells whether it did: what the file ended with
        when it was opened is not written again.
        """
        if self._file is None:
            return False
        line = json.dumps({"step": step} | values)
        if line == self._last:
            return False
        self._file.write(line + "\n")
        return True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def reopen(path: pathlib.Path, kept: list[dict[str, Any]]) -> TextIO:
    """Opens a file with these lines alone, replaced in one move, to append to; each line that is
    written goes to the system at once.
    """
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(path)
    return path.open("a", buffering=1)


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the lines of such a file, none where there is none; a last line that a kill cut short
    is left out.

    Raises: OSError for one that cannot be read just now: taken for none, what it holds would be
      lost.
    """
    try:
        text = retry_read(path.read_text)
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
