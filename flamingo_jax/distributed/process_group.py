"""All processes of a run as the training loop sees them: barriers, heartbeats, when to stop.

Of several, each reports to its supervisor (`SupervisorClient`); one alone has none
(`SingleProcess`).
"""

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

from flamingo_jax.distributed.coordinator import Timeouts
from flamingo_jax.distributed.fingerprint import run_fingerprint
from flamingo_jax.distributed.json_socket import JsonSocket
from flamingo_jax.distributed.process_info import ProcessInfo
from flamingo_jax.distributed.supervised import SUPERVISOR_FD
from flamingo_jax.errors import EXIT_SAVE_FAILED, UserError
from flamingo_jax.experiment import Experiment

log = logging.getLogger(__name__)

SECONDS_BETWEEN_HEARTBEATS = 0.2
SHUTDOWN_SECONDS = 60
"""For which a process that ends waits for the others to end."""
SECONDS_BETWEEN_REPORTS = 1.0
"""Of the progress of what is read or written."""
DECISION_SECONDS = 5.0
"""What fails because another process has died waits so long for the supervisor, which knows
which one.
"""


class ProcessGroup(Protocol):
    """Coordinates all processes of a run, as the training loop asks for it."""

    def handling_signals(self) -> AbstractContextManager[None]:
        """Within, a signal asks for an end at a step; before and after it ends the process at
        once.
        """

    def heartbeat(self, step: int, phase: str, waited: float) -> None:
        """Tells the others how far this one is. waited: seconds spent waiting for data so far."""

    def report_progress(self, what: str) -> None:
        """Tells the others that this one got on with what it reads or writes, as "saving step
        12"; "" once that is done. From any thread, as often as one likes.
        """

    def barrier(self, where: str) -> None:
        """Returns once all have come to the place of this name, however long it takes the last:
        what waits for others on a device has time limits of its own. From any thread, one a
        name at a time.
        """

    def should_stop(self, step: int) -> bool:
        """Tells whether all save and end at this step, since a signal asked one of them to.

        Every process asks at every step.
        """

    def stop_requested(self) -> bool:
        """Tells whether a signal asked this process to end, which needs no other one for that."""


class SingleProcess:
    """Coordinates a run of one process, which has nobody to wait for."""

    def __init__(self) -> None:
        self._asked = False

    @contextlib.contextmanager
    def handling_signals(self) -> Iterator[None]:
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

    def heartbeat(self, step: int, phase: str, waited: float) -> None:
        pass

    def report_progress(self, what: str) -> None:
        pass

    def barrier(self, where: str) -> None:
        pass

    def should_stop(self, step: int) -> bool:
        return self._asked

    def stop_requested(self) -> bool:
        return self._asked


class SupervisorClient:
    """Connects a supervised process to its supervisor, from its start to its end.

    `with SupervisorClient(process_info, timeouts) as client: client.join(...)`.
    """

    def __init__(self, process_info: ProcessInfo, timeouts: Timeouts):
        self._process_info, self._timeouts = process_info, timeouts
        # Not for processes that this one starts.
        self._socket = JsonSocket(socket.socket(fileno=int(os.environ.pop(SUPERVISOR_FD))))
        self._lock = threading.Lock()
        self._going = threading.Event()
        self._barriers: dict[str, threading.Event] = {}
        self._work, self._worked = "", 0.0
        self._phase, self._step, self._last_heartbeat, self._stride = "", 0, time.monotonic(), 1

    def __enter__(self) -> "SupervisorClient":
        return self

    def join(self, experiment: Experiment, workdir: pathlib.Path) -> None:
        """Returns once all processes are there and agree, with JAX's own service running
        between them. To be called before any device is used.
        """
        self._send({"fingerprint": run_fingerprint(experiment, workdir)})
        threading.Thread(target=self._listen, daemon=True, name="supervisor-client").start()
        self._going.wait()
        # The supervisors notice before JAX's service does, which aborts without a word of who
        # is gone.
        patience = round(10 * self._timeouts.lost) + 100
        jax.distributed.initialize(
            self._process_info.address,
            self._process_info.count,
            self._process_info.index,
            local_device_ids=self._process_info.local_devices,
            initialization_timeout=round(self._timeouts.start),
            heartbeat_timeout_seconds=patience,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
        # JAX's service listens to SIGTERM alone.
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))

    def handling_signals(self) -> AbstractContextManager[None]:
        """JAX's service listens from `join` on, and agrees with the others on the step."""
        return contextlib.nullcontext()

    def heartbeat(self, step: int, phase: str, waited: float) -> None:
        if phase == self._phase and step % self._stride:
            return
        now = time.monotonic()
        if step > self._step:
            # Powers of two, so that all processes tell of the same steps, about as often as
            # SECONDS_BETWEEN_BEATS.
            steps = (
                SECONDS_BETWEEN_HEARTBEATS
                * (step - self._step)
                / max(now - self._last_heartbeat, 1e-6)
            )
            self._stride = 1 << max(0, math.ceil(math.log2(steps)))
            self._step, self._last_heartbeat = step, now
        self._phase = phase
        self._send({"heartbeat": {"step": step, "phase": phase, "waited": waited}})

    def report_progress(self, what: str) -> None:
        now = time.monotonic()
        if what != self._work or now - self._worked >= SECONDS_BETWEEN_REPORTS:
            self._work, self._worked = what, now
            self._send({"progress": what})

    def barrier(self, where: str) -> None:
        met = self._barriers[where] = threading.Event()
        self._send({"barrier": where})
        met.wait()
        del self._barriers[where]

    def should_stop(self, step: int) -> bool:
        return multihost_utils.reached_preemption_sync_point(step)

    def stop_requested(self) -> bool:
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
        self._send({"exit": code, "why": why})
        if code in (1, EXIT_SAVE_FAILED):
            # What it would say itself would only hide the reason.
            time.sleep(DECISION_SECONDS)

    def leave(self, code: int) -> None:
        """Says that this process ends as it should."""
        self._send({"exit": code, "why": "it was asked to"})

    def _send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._socket.send(message)

    def _listen(self) -> None:
        """Hears the supervisor, and ends with it: without it nobody would end this process when
        the others are gone.
        """
        while self._socket.open:
            time.sleep(0.05)
            with self._lock:
                messages = self._socket.receive()
            for message in messages:
                if "start" in message:
                    self._going.set()
                if "barrier_passed" in message:
                    self._barriers[message["barrier_passed"]].set()
        os.kill(os.getpid(), signal.SIGKILL)
