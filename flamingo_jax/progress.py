"""Progress output: a bar on a terminal, and elsewhere a line every few seconds."""

import re
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

TOTAL_SECONDS = "total"
"""The key of a run's total wall seconds, in the dict of its commands' seconds. It is less than
their sum if some ran in parallel.
"""
SECONDS_BETWEEN_LINES = 10.0
LINE = re.compile(r"(.+?) (\d+)/(\d+) (.*?) ?(?:(?:\d+|nan) s left|in \d+ s)")
"""Matches a line that a Bar prints without a terminal: title, done, total, note."""


class Bar:
    """A progress bar: `with Bar("train", total=1000) as bar: bar.advance(1, "loss 2.31")`.

    start: how many are already done, as in a resumed run. enabled: False prints nothing.
    """

    def __init__(self, title: str, total: int, *, start: int = 0, enabled: bool = True):
        self.title, self.total, self.done, self.first = title, total, start, start
        self._enabled = enabled
        self._console = Console(stderr=True)
        self._rich = _bars(self._console, enabled)
        self._task = self._rich.add_task(title, total=total, completed=start, note="")
        self._began = self._said = time.monotonic()
        self._note = ""

    def __enter__(self) -> "Bar":
        self._rich.start()
        return self

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Advances by `count`; `note` is shown until the next one."""
        self.done += count
        self._note = self._note if note is None else note
        self._rich.update(self._task, completed=self.done, note=self._note)
        now = time.monotonic()
        if not self._rich.disable or not self._enabled or now - self._said < SECONDS_BETWEEN_LINES:
            return
        self._said = now
        self._line(now)

    def _line(self, now: float) -> None:
        made = self.done - self.first
        left = (now - self._began) / made * (self.total - self.done) if made else float("nan")
        self._console.print(
            f"{self.title} {self.done}/{self.total} {self._note} {left:.0f} s left",
            highlight=False,
            soft_wrap=True,
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._rich.stop()
        if self._rich.disable and self._enabled:
            seconds = time.monotonic() - self._began
            self._console.print(
                f"{self.title} {self.done}/{self.total} {self._note} in {seconds:.0f} s",
                highlight=False,
                soft_wrap=True,
            )


class Relay:
    """Shows the output of parallel processes: on a terminal their progress bars below each
    other, and all other lines above them.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._rich = _bars(self._console, True)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Relay":
        self._rich.start()
        return self

    def show(self, line: str) -> None:
        """Shows a line of one of the processes. May be called from several threads."""
        found = None if self._rich.disable else LINE.fullmatch(line)
        if found is None:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
            return
        title, done, total, note = found.groups()
        if title not in self._tasks:
            self._tasks[title] = self._rich.add_task(title, total=int(total), note="")
        self._rich.update(self._tasks[title], completed=int(done), total=int(total), note=note)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._rich.stop()


def _bars(console: Console, enabled: bool) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not (enabled and console.is_terminal),
    )
