"""Runs commands in processes of their own, in sequence or in parallel, each once, and records
how long they took.
"""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from flamingo_jax import errors
from flamingo_jax.progress import TOTAL_SECONDS, Relay

ShowLine = Callable[[str], None]


class ResumableCommands:
    """Runs the commands that `file` does not list as finished.

    file: JSON of {name: wall seconds} of the finished commands, and TOTAL_SECONDS over all
      starts.
    """

    def __init__(self, file: pathlib.Path):
        self._file = file
        self._seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
        self._began = time.monotonic() - self._seconds.get(TOTAL_SECONDS, 0.0)
        # Reentrant, since a signal handler may call `stop` while the main thread holds the
        # lock.
        self._lock = threading.RLock()
        self._stopped = False
        self._running: set[subprocess.Popen[str]] = set()

    @property
    def total(self) -> float:
        """Wall seconds so far, over all starts."""
        return time.monotonic() - self._began

    def is_done(self, name: str) -> bool:
        """Returns whether a command has finished, in this or an earlier start."""
        return name in self._seconds

    def run(
        self, name: str, *arguments: str, again: Sequence[str] = (), show: ShowLine | None = None
    ) -> None:
        """Runs Python with `arguments` unless the command `name` is finished already.

        Args:
          again: arguments to add for a second run, if the first ends with EXIT_NOT_LEARNED.
          show: gets the lines that the process prints; by default they go to the terminal.

        Raises: UserError if the process fails.
        """
        if self.is_done(name):
            return
        say = show or (lambda line: print(line, flush=True))
        say(f"== {name}")
        began = time.monotonic()
        code = self._call(arguments, show)
        if code == errors.EXIT_NOT_LEARNED and again:
            say(f"== {name}, longer: {' '.join(again)}")
            code = self._call([*arguments, *again], show)
        if code != 0:
            raise errors.UserError(
                f"the run stopped in {name!r} (exit code {code}); start it again to go on from"
                " there"
            )
        with self._lock:
            self._seconds |= {name: time.monotonic() - began, TOTAL_SECONDS: self.total}
            self._file.write_text(json.dumps(self._seconds, indent=2))

    def side_by_side(
        self, lanes: Sequence[Callable[[ShowLine], None]], cores: Sequence[set[int]]
    ) -> None:
        """Runs the lanes in parallel, each on its own set of cores. A lane is a function that
        calls `run` with the `show` that it is given.

        If one fails, the others are asked to save and exit.
        """

        def lane_on(lane: Callable[[ShowLine], None], mine: set[int], show: ShowLine) -> None:
            # Applies to this thread and to the processes that it starts.
            os.sched_setaffinity(0, mine)
            lane(show)

        with Relay() as relay, ThreadPoolExecutor(len(lanes)) as pool:
            first: BaseException | None = None
            for future in as_completed(
                [
                    pool.submit(lane_on, lane, mine, relay.show)
                    for lane, mine in zip(lanes, cores, strict=True)
                ]
            ):
                if future.exception() is not None and first is None:
                    first = future.exception()
                    self.stop()
        if first is not None:
            raise first

    def _call(self, arguments: Sequence[str], show: ShowLine | None) -> int:
        stream = None if show is None else subprocess.PIPE
        with self._lock:
            if self._stopped:
                raise errors.UserError("the run was stopped; start it again to go on from there")
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=stream,
                stderr=None if show is None else subprocess.STDOUT,
                text=True,
            )
            self._running.add(process)
        try:
            if show is not None and process.stdout is not None:
                for line in process.stdout:
                    show(line.rstrip("\n"))
            return process.wait()
        except KeyboardInterrupt:
            # The process has received Ctrl-C as well, and saves.
            process.wait()
            raise
        finally:
            with self._lock:
                self._running.discard(process)

    def stop(self) -> None:
        """Asks the running processes to save and exit, and starts no further ones."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def halves() -> list[set[int]]:
    """Splits the cores that this process may use into two halves; one half if there is only
    one core, none if a process cannot choose its cores (macOS).
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    middle = len(cores) // 2
    return [half for half in (set(cores[:middle]), set(cores[middle:])) if half]
