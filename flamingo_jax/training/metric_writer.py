"""Writes what a run measured as JSON lines, cut back to the restored step on resume."""

import json
import pathlib
from typing import Any

from flamingo_jax.json_lines import LineWriter, read_lines, reopen


class MetricWriter:
    """Writes `<workdir>/metrics.jsonl`, one object a line. A disabled one writes nothing."""

    def __init__(self, workdir: pathlib.Path, *, resume_step: int, enabled: bool = True):
        self._file: LineWriter | None = None
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

    def flush(self) -> None:
        """Brings what was written to the storage."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
