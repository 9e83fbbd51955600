"""Measures goodput: the share of a run's wall time, over all of its starts, that was spent on
training steps that were not lost, and where the rest went.

Each start writes to `<workdir>/goodput.jsonl` when it began, and then how many seconds each
kind of work took since the previous line. Durations within a start come from the monotonic
clock, the time between starts from the wall clock, so that setting the clock distorts only the
latter, and never makes it negative.
"""

import collections
import contextlib
import json
import pathlib
import time
from collections.abc import Iterator
from typing import NamedTuple

from flamingo_jax.errors import UserError
from flamingo_jax.json_lines import LineWriter, read_lines, reopen

FILE_NAME = "goodput.jsonl"
STEPS = "steps"
KINDS = (STEPS, "start", "compile", "data", "save", "evaluate", "lost", "down")
"""Kinds of time.

steps: training steps whose result was kept.
start: from the command to the loop.
data: the loop waited for the next batch.
save: the loop waited for a save; writing in the background costs nothing.
lost: steps that were not saved, which a later start trained again.
down: from the last line of a start to the next start, including what a killed start did after
its last line.
"""


class Goodput:
    """Measures one start of a run.

    Args:
      workdir: the run's folder, which exists.
      resume_step: the step that this start resumes from.
      enabled: False on every process but the first, which then does nothing.
      began: time.monotonic() when the command began; the time since then counts as "start".
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        resume_step: int,
        enabled: bool = True,
        began: float | None = None,
    ):
        self._file: LineWriter | None = None
        if not enabled:
            return
        self._since = time.monotonic() if began is None else began
        wall = time.time() - (time.monotonic() - self._since)
        self._kind, self._step, self._waited = "start", resume_step, 0.0
        self._seconds: dict[str, float] = collections.defaultdict(float)
        path = workdir / FILE_NAME
        self._file = reopen(path, read_lines(path))
        self._charge()
        self._kind = STEPS
        self._write({"resume": resume_step, "time": wall})
        self.flush()

    def flush(self) -> None:
        """Flushes written lines to storage: a start that is killed later is still counted."""
        if self._file is not None:
            self._file.flush()

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Counts the time inside as `kind`, except for what a nested `timed` takes. Time
        outside of all of them counts as steps.

        Raises: ValueError for a kind that is none of `KINDS`.
        """
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no kind of time: use one of {', '.join(KINDS)}")
        if self._file is None:
            yield
            return
        self._charge()
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._charge()
            self._kind = before

    def record(self, step: int, waited: float = 0.0) -> None:
        """Writes where the time since the previous line went; its steps end with `step`.

        Args:
          waited: seconds that the loop has waited for data in this start so far, outside of
            `timed`; what is new is moved from "steps" to "data".
        """
        if self._file is None:
            return
        self._charge()
        moved = min(max(waited - self._waited, 0.0), self._seconds[STEPS])
        self._waited = max(waited, self._waited)
        self._seconds[STEPS] -= moved
        self._seconds["data"] += moved
        self._step = step
        self._write({"step": step})

    def close(self) -> None:
        """Writes the time since the last line and closes the file.

        Steps after the last line count as lost: no record says that they were saved.
        """
        if self._file is None:
            return
        self._charge()
        self._seconds["lost"] += self._seconds.pop(STEPS, 0.0)
        self._write({"step": self._step})
        self._file.close()
        self._file = None

    def _charge(self) -> None:
        """Adds the time since the last call to the current kind."""
        now = time.monotonic()
        self._seconds[self._kind] += now - self._since
        self._since = now

    def _write(self, line: dict[str, float]) -> None:
        assert self._file is not None
        spent = {kind: round(seconds, 4) for kind, seconds in self._seconds.items() if seconds > 0}
        self._seconds.clear()
        self._file.write(json.dumps(line | {"seconds": spent}) + "\n")


class RunStart(NamedTuple):
    """One start of a run."""

    resume: int
    """The step that it resumed from."""
    step: int
    """The last step that it recorded."""
    seconds: dict[str, float]
    """{kind: seconds} for all `KINDS`; "down" is the time before this start."""


class GoodputReport(NamedTuple):
    """Where the time of a run went, start by start."""

    starts: list[RunStart]

    @property
    def seconds(self) -> dict[str, float]:
        """Sums the seconds of all starts by kind."""
        return {kind: sum(start.seconds[kind] for start in self.starts) for kind in KINDS}

    @property
    def share(self) -> float:
        return share(self.seconds)

    def sentence(self) -> str:
        """Formats the report as "goodput 91.2 %: compile 5.0, data 3.8": percentages of all
        time, the largest loss first.
        """
        seconds = self.seconds
        total = sum(seconds.values()) or 1.0
        rest = sorted(
            ((100 * seconds[kind] / total, kind) for kind in KINDS if kind != STEPS),
            reverse=True,
        )
        told = ", ".join(f"{kind} {part:.1f}" for part, kind in rest if part >= 0.05)
        return f"goodput {100 * self.share:.1f} %" + (f": {told}" if told else "")


def share(seconds: dict[str, float]) -> float:
    """Computes the share of "steps" in all seconds; 0 where there are none."""
    return seconds[STEPS] / (sum(seconds.values()) or 1.0)


def read_goodput(workdir: pathlib.Path) -> GoodputReport:
    """Reads the goodput of the run in a folder, over all of its starts.

    Raises: UserError where none was recorded.
    """
    groups: list[list[dict]] = []
    for line in read_lines(workdir / FILE_NAME):
        if "resume" in line:
            groups.append([])
        groups[-1].append(line)
    if not groups:
        raise UserError(
            f"{workdir} holds no {FILE_NAME}: name the folder of a run that has trained"
        )
    starts, end = [], groups[0][0]["time"]
    for place, (first, *lines) in enumerate(groups):
        # Kept are this start's steps up to the earliest step that a later start resumed from;
        # the others were trained again. Lines that cross it are divided in proportion.
        counted = min((group[0]["resume"] for group in groups[place + 1 :]), default=float("inf"))
        seconds = dict.fromkeys(KINDS, 0.0) | first["seconds"]
        step = first["resume"]
        for line in lines:
            for kind, value in line["seconds"].items():
                seconds[kind] += value
            if line["step"] > counted:
                lost = line["seconds"].get(STEPS, 0.0) * min(
                    (line["step"] - counted) / max(line["step"] - step, 1), 1.0
                )
                seconds[STEPS] -= lost
                seconds["lost"] += lost
            step = line["step"]
        running = sum(seconds.values())
        seconds["down"] = max(first["time"] - end, 0.0)
        starts.append(RunStart(first["resume"], step, seconds))
        end = first["time"] + running
    return GoodputReport(starts)
