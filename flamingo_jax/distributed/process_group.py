"""What the training loop needs of the other processes: barriers, heartbeats, when to stop.

In a run of several processes each reports to its supervisor (`SupervisorClient`); a run of one
process has none (`SingleProcess`).
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
"""How long a process that ends waits for the others to end."""
SECONDS_BETWEEN_REPORTS = 1.0
"""Seconds between two reports of progress to the supervisor."""
DECISION_SECONDS = 5.0
"""How long a process that fails waits for the supervisor's decision: often it fails because
another process has died, and only the supervisor knows which one.
"""


class ProcessGroup(Protocol):
    """Coordinates the processes of a run. All processes call its methods in the same order."""

    def handling_signals(self) -> AbstractContextManager[None]:
        """Returns a context in which SIGTERM and SIGINT request a stop at the end of a step;
        outside of it they end the process at once.
        """

    def heartbeat(self, step: int, phase: str, waited: float) -> None:
        """Reports step and phase to the others. waited: seconds spent waiting for data so
        far.
        """

    def report_progress(self, what: str) -> None:
        """Reports that this process has made progress in reading or writing, such as "saving
        step 12"; "" when that is done. May be called from any thread, as often as one likes.
        """

    def barrier(self, where: str) -> None:
        """Returns once all processes have called it with the same name, however long that
        takes. Use it before a collective if processes may arrive far apart, since collectives
        have time limits. May be called from any thread, but only once at a time for each name.
        """

    def should_stop(self, step: int) -> bool:
        """Returns whether all processes must save and stop at this step, because one of them
        has received a signal. Every process must call it at every step.
        """

    def stop_requested(self) -> bool:
        """Returns whether this process may stop at once, without the others, after a
        signal.
        """


class SingleProcess:
    """Implements `ProcessGroup` for a run of one process: barriers return at once."""

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
        """Returns whether a signal has arrived; there is nobody to agree with."""
        return self._asked

    def stop_requested(self) -> bool:
        return self._asked


class SupervisorClient:
    """Implements `ProcessGroup` for a process that a supervisor has started.

    `with SupervisorClient(process_info, timeouts) as client: client.join(...)`.
    """

    def __init__(self, process_info: ProcessInfo, timeouts: Timeouts):
        self._process_info, self._timeouts = process_info, timeouts
        # Removed from the environment, so that child processes do not take the socket for
        # theirs.
        self._socket = JsonSocket(socket.socket(fileno=int(os.environ.pop(SUPERVISOR_FD))))
        self._lock = threading.Lock()
        self._going = threading.Event()
        self._barriers: dict[str, threading.Event] = {}
        self._work, self._worked = "", 0.0
        self._phase, self._step, self._last_heartbeat, self._stride = "", 0, time.monotonic(), 1

    def __enter__(self) -> "SupervisorClient":
        return self

    def join(self, experiment: Experiment, workdir: pathlib.Path) -> None:
        """Waits until all processes are connected and their fingerprints agree, then
        initialises jax.distributed. Must be called before any device is used.
        """
        self._send({"fingerprint": run_fingerprint(experiment, workdir)})
        threading.Thread(target=self._listen, daemon=True, name="supervisor-client").start()
        self._going.wait()
        # Much longer than our own limit: the supervisors must notice a dead process first,
        # since JAX's coordination service aborts without naming the process that died.
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
        # JAX's coordination service handles SIGTERM only.
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))

    def handling_signals(self) -> AbstractContextManager[None]:
        """Does nothing: after `join`, JAX's service handles SIGTERM and agrees on a step."""
        return contextlib.nullcontext()

    def heartbeat(self, step: int, phase: str, waited: float) -> None:
        """Sends step and phase to the supervisor, at most about five times a second."""
        # Not at every step: short steps would flood the supervisor with messages.
        if phase == self._phase and step % self._stride:
            return
        now = time.monotonic()
        if step > self._step:
            # A heartbeat about every SECONDS_BETWEEN_HEARTBEATS. The stride is a power of two,
            # so that all processes report the same steps and their arrival can be compared.
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
        """Waits until the coordinator reports that all processes have come here."""
        met = self._barriers[where] = threading.Event()
        self._send({"barrier": where})
        met.wait()
        del self._barriers[where]

    def should_stop(self, step: int) -> bool:
        """Asks JAX's coordination service, which picks a step that no process has passed
        yet.
        """
        return multihost_utils.reached_preemption_sync_point(step)

    def stop_requested(self) -> bool:
        """Returns False: a process of several stops only together with the others."""
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
            # Give the supervisor time to print its decision, which names the cause, before
            # this process prints its own traceback.
            time.sleep(DECISION_SECONDS)

    def leave(self, code: int) -> None:
        """Reports that this process is about to exit with `code`, as intended."""
        self._send({"exit": code, "why": "it was asked to"})

    def _send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._socket.send(message)

    def _listen(self) -> None:
        """Receives messages from the supervisor, and kills this process when the supervisor is
        gone: otherwise it would wait for ever in a collective.
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
