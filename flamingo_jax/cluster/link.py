"""A training process's word to its supervisor, and what it does alone where it has none."""

import contextlib
import logging
import math
import os
import pathlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol

import jax
from jax.experimental import multihost_utils

from flamingo_jax.cluster.facts import gather
from flamingo_jax.cluster.line import Line
from flamingo_jax.cluster.place import Place
from flamingo_jax.cluster.register import Limits
from flamingo_jax.errors import EXIT_SAVE_FAILED, UserError
from flamingo_jax.experiment import Experiment

log = logging.getLogger(__name__)

LINK = "FLAMINGO_JAX_LINK"
"""The environment variable that tells a supervised process the file descriptor of its
supervisor.
"""
SECONDS_BETWEEN_BEATS = 0.2
SHUTDOWN_SECONDS = 60
"""For which a process that ends waits for the others to end."""
SECONDS_BETWEEN_WORDS = 1.0
"""Of the progress of what is read or written."""
VERDICT_SECONDS = 5.0
"""What fails because another process has died waits so long for the supervisor, which knows
which one.
"""


class Crew(Protocol):
    """All processes of a run, as the training loop sees them."""

    def listening(self) -> AbstractContextManager[None]:
        """Within, a signal asks for an end at a step; before and after it ends the process at
        once.
        """

    def beat(self, step: int, phase: str, waited: float) -> None:
        """Tells the others how far this one is. waited: seconds spent waiting for data so far."""

    def work(self, what: str) -> None:
        """Tells the others that this one got on with what it reads or writes, as "saving step
        12"; "" once that is done. From any thread, as often as one likes.
        """

    def meet(self, where: str) -> None:
        """Returns once all have come to the place of this name, however long it takes the last:
        what waits for others on a device has time limits of its own. From any thread, one a
        name at a time.
        """

    def should_stop(self, step: int) -> bool:
        """Whether all save and end at this step, since a signal asked one of them to.

        Every process asks at every step.
        """

    def may_stop(self) -> bool:
        """Whether a signal asked this process to end, which needs no other one for that."""


class Alone:
    """A run of one process."""

    def __init__(self) -> None:
        self._asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        numbers = (
            (signal.SIGTERM, signal.SIGINT)
            if threading.current_thread() is threading.main_thread()
            else ()
        )
        before = {number: signal.signal(number, self._ask) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True

    def beat(self, step: int, phase: str, waited: float) -> None:
        pass

    def work(self, what: str) -> None:
        pass

    def meet(self, where: str) -> None:
        pass

    def should_stop(self, step: int) -> bool:
        return self._asked

    def may_stop(self) -> bool:
        return self._asked


def is_supervised() -> bool:
    return LINK in os.environ


class Link:
    """`with Link(place, limits) as link: link.join(...)`: a supervised process from its start
    to its end.
    """

    def __init__(self, place: Place, limits: Limits):
        self._place, self._limits = place, limits
        # Not for processes that this one starts.
        self._line = Line(socket.socket(fileno=int(os.environ.pop(LINK))))
        self._lock = threading.Lock()
        self._going = threading.Event()
        self._met: dict[str, threading.Event] = {}
        self._work, self._worked = "", 0.0
        self._phase, self._step, self._beaten, self._stride = "", 0, time.monotonic(), 1

    def __enter__(self) -> "Link":
        return self

    def join(self, experiment: Experiment, workdir: pathlib.Path) -> None:
        """Returns once all processes are there and agree, with JAX's own service running
        between them. To be called before any device is used.
        """
        self._send({"facts": gather(experiment, workdir)})
        threading.Thread(target=self._listen, daemon=True, name="link").start()
        self._going.wait()
        # The supervisors notice before JAX's service does, which aborts without a word of who
        # is gone.
        patience = round(10 * self._limits.lost) + 100
        jax.distributed.initialize(
            self._place.address,
            self._place.count,
            self._place.index,
            local_device_ids=self._place.local_devices,
            initialization_timeout=round(self._limits.start),
            heartbeat_timeout_seconds=patience,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
        # JAX's service listens to SIGTERM alone.
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))

    def listening(self) -> AbstractContextManager[None]:
        """JAX's service listens from `join` on, and agrees with the others on the step."""
        return contextlib.nullcontext()

    def beat(self, step: int, phase: str, waited: float) -> None:
        if phase == self._phase and step % self._stride:
            return
        now = time.monotonic()
        if step > self._step:
            # Powers of two, so that all processes tell of the same steps, about as often as
            # SECONDS_BETWEEN_BEATS.
            steps = SECONDS_BETWEEN_BEATS * (step - self._step) / max(now - self._beaten, 1e-6)
            self._stride = 1 << max(0, math.ceil(math.log2(steps)))
            self._step, self._beaten = step, now
        self._phase = phase
        self._send({"beat": {"step": step, "phase": phase, "waited": waited}})

    def work(self, what: str) -> None:
        now = time.monotonic()
        if what != self._work or now - self._worked >= SECONDS_BETWEEN_WORDS:
            self._work, self._worked = what, now
            self._send({"work": what})

    def meet(self, where: str) -> None:
        met = self._met[where] = threading.Event()
        self._send({"meet": where})
        met.wait()
        del self._met[where]

    def should_stop(self, step: int) -> bool:
        return multihost_utils.reached_preemption_sync_point(step)

    def may_stop(self) -> bool:
        return False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        if isinstance(error, SystemExit):
            return self.leave(error.code if isinstance(error.code, int) else 1)
        code, why = 1, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if isinstance(error, UserError):
            code, why = error.exit_code, str(error)
        self._send({"left": code, "why": why})
        if code in (1, EXIT_SAVE_FAILED):
            # What it would say itself would only hide the reason.
            time.sleep(VERDICT_SECONDS)

    def leave(self, code: int) -> None:
        """Says that this process ends as it should."""
        self._send({"left": code, "why": "it was asked to"})

    def _send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._line.send(message)

    def _listen(self) -> None:
        """Hears the supervisor, and ends with it: without it nobody would end this process when
        the others are gone.
        """
        while self._line.open:
            time.sleep(0.05)
            with self._lock:
                messages = self._line.take()
            for message in messages:
                if "go" in message:
                    self._going.set()
                if "met" in message:
                    self._met[message["met"]].set()
        os.kill(os.getpid(), signal.SIGKILL)
