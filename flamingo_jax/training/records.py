"""Where a run writes what it measured: JSON lines and TensorBoard, cut back to the restored step on resume."""

import json
import pathlib
from typing import Any, TextIO

import numpy as np
import tensorboardX


class Records:
    """Writes `<workdir>/metrics.jsonl`, one object a line, and `<workdir>/tensorboard/`. A disabled one writes nothing."""

    def __init__(self, workdir: pathlib.Path, *, resume_step: int, enabled: bool = True):
        self._file = self._board = None
        if not enabled:
            return
        path = workdir / "metrics.jsonl"
        kept = [line for line in read_lines(path) if line["step"] <= resume_step]
        self._last = json.dumps(kept[-1]) if kept else ""
        self._file = reopen(path, kept)
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Scalars and short vectors at a step. What the file ended with when it was opened is not written again."""
        if self._file is None or self._board is None:
            return
        plain = {name: np.asarray(value).tolist() for name, value in values.items()}
        line = json.dumps({"step": step} | plain)
        if line == self._last:
            return
        self._file.write(line + "\n")
        for name, value in plain.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)
            elif isinstance(value, list):
                for place, item in enumerate(value):
                    self._board.add_scalar(f"{name}/{place}", item, step)

    def close(self) -> None:
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


def reopen(path: pathlib.Path, kept: list[dict[str, Any]]) -> TextIO:
    """The file with these lines alone, replaced in one move, to append to; each line that is written goes to the system at once."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(path)
    return path.open("a", buffering=1)


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of such a file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
