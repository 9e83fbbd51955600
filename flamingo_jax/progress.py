"""Progress that a person can read: a bar on a terminal, a line every few seconds elsewhere."""

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
"""The key of the wall seconds of all commands of a run together, among those of each: less than
their sum where some ran side by side.
"""
SECONDS_BETWEEN_LINES = 10.0
LINE = re.compile(r"(.+?) (\d+)/(\d+) (.*?) ?(?:(?:\d+|nan) s left|in \d+ s)")
"""What a Bar writes where there is no terminal: title, done, total and note."""


class Bar:
    """`with Bar("train", total=1000) as bar: bar.advance(1, "loss 2.31")`."""

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
        """`count` more are done; `note` stays until the next one."""
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
    """The lines of processes that run side by side: on a terminal their bars below each other
    and everything else above them.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._rich = _bars(self._console, True)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Relay":
        self._rich.start()
        return self

    def show(self, line: str) -> None:
        """A line of one of the processes. May be called from several threads."""
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
