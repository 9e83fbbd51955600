"""Where a run writes what it measured: JSON lines and TensorBoard, cut back to the restored
step on resume.
"""

import json
import pathlib
import time
from typing import Any, TextIO

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from flamingo_jax.checkpointing.manifest import retry_read

FLUSH_SECONDS = 30.0
"""Between what TensorBoard is shown: its file is brought to the disk each time."""


class MetricWriter:
    """Writes `<workdir>/metrics.jsonl`, one object a line, and `<workdir>/tensorboard/`.

    A disabled one writes nothing.
    """

    def __init__(self, workdir: pathlib.Path, *, resume_step: int, enabled: bool = True):
        self._file = self._board = None
        if not enabled:
            return
        path = workdir / "metrics.jsonl"
        kept = [line for line in read_lines(path) if line["step"] <= resume_step]
        self._last = json.dumps(kept[-1]) if kept else ""
        self._file = reopen(path, kept)
        self._board = _Board(workdir / "tensorboard", resume_step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Scalars and short vectors at a step.

        What the file ended with when it was opened is not written again.
        """
        if self._file is None or self._board is None:
            return
        plain = {name: np.asarray(value).tolist() for name, value in values.items()}
        line = json.dumps({"step": step} | plain)
        if line == self._last:
            return
        self._file.write(line + "\n")
        for name, value in plain.items():
            if isinstance(value, (int, float)):
                self._board.add(name, value, step)
            elif isinstance(value, list):
                for place, item in enumerate(value):
                    self._board.add(f"{name}/{place}", item, step)
        self._board.show()

    def close(self) -> None:
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


class _Board:
    """TensorBoard's event file, written by who calls. The library's own SummaryWriter has a
    thread for it, which dies of a full disk, and waits for it for ever after.
    """

    def __init__(self, folder: pathlib.Path, resume_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        # What an earlier start wrote after that step is not shown.
        self._writer.write_event(
            Event(
                wall_time=time.time(),
                step=resume_step + 1,
                session_log=SessionLog(status=SessionLog.START),
            )
        )
        self._shown = time.monotonic()

    def add(self, name: str, value: float, step: int) -> None:
        self._writer.write_event(
            Event(wall_time=time.time(), step=step, summary=scalar(name, value))
        )

    def show(self) -> None:
        if time.monotonic() - self._shown > FLUSH_SECONDS:
            self._writer.flush()
            self._shown = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def reopen(path: pathlib.Path, kept: list[dict[str, Any]]) -> TextIO:
    """The file with these lines alone, replaced in one move, to append to; each line that is
    written goes to the system at once.
    """
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(path)
    return path.open("a", buffering=1)


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of such a file, none where there is none; a last line that a kill cut short is
    left out. Raises OSError for one that cannot be read just now: taken for none, what it holds
    would be lost.
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
