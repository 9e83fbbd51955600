"""Progress that a person can read: a bar on a terminal, a line every few seconds elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """`with Bar("train", total=1000) as bar: bar.advance(1, "loss 2.31")`."""

    def __init__(self, title: str, total: int, *, start: int = 0, enabled: bool = True):
        self.title, self.total, self.done, self.first = title, total, start, start
        self._enabled = enabled
        self._console = Console(stderr=True)
        self._rich = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self._console,
            disable=not (enabled and self._console.is_terminal),
        )
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
        self._console.print(f"{self.title} {self.done}/{self.total} {self._note} {left:.0f} s left", highlight=False, soft_wrap=True)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._rich.stop()
        if self._rich.disable and self._enabled:
            seconds = time.monotonic() - self._began
            self._console.print(f"{self.title} {self.done}/{self.total} {self._note} in {seconds:.0f} s", highlight=False, soft_wrap=True)
