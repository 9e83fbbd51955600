"""Writes a run's metrics to metrics.jsonl; a resumed run first drops lines of later steps."""

import json
import pathlib
from typing import Any

from flamingo_jax.json_lines import LineWriter, read_lines, reopen


class MetricWriter:
    """Writes `<workdir>/metrics.jsonl`, one JSON object per line: {"step": ..., metric: ...}.

    Args:
      resume_step: lines of later steps are removed, since these will be trained again.
      enabled: False on all processes but the first, which write nothing.
    """

    def __init__(self, workdir: pathlib.Path, *, resume_step: int, enabled: bool = True):
        self._file: LineWriter | None = None
        if not enabled:
            return
        path = workdir / "metrics.jsonl"
        kept = [line for line in read_lines(path) if line["step"] <= resume_step]
        self._last = json.dumps(kept[-1]) if kept else ""
        self._file = reopen(path, kept)

    def write(self, step: int, values: dict[str, Any]) -> bool:
        """Writes the values measured at a step; returns whether it did.

        A line equal to the file's last one when it was opened is not written again: a start
        that resumes at the end of a run evaluates once more.
        """
        if self._file is None:
            return False
        line = json.dumps({"step": step} | values)
        if line == self._last:
            return False
        self._file.write(line + "\n")
        return True

    def flush(self) -> None:
        """Flushes written lines to storage."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        if self._file is not None:
            self._file.close()
