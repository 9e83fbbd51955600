"""Supervises a process of a run: starts it, watches it, and ends it with an error message when
other processes are gone.

A process that waits for a dead one in a collective waits for ever, or is aborted by JAX's
coordination service without a message that names the dead one. So the command starts itself
once more as a child, which trains. The parent, the supervisor, keeps a connection to the
supervisor of process 0, whose `Coordinator` knows all processes.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import queue
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from flamingo_jax import paths
from flamingo_jax.distributed.coordinator import (
    LOG_SECONDS,
    SAVING,
    Coordinator,
    ExitDecision,
    Timeouts,
)
from flamingo_jax.distributed.json_socket import JsonSocket, Message
from flamingo_jax.distributed.process_info import ProcessInfo
from flamingo_jax.distributed.supervised import SUPERVISOR_FD
from flamingo_jax.errors import (
    EXIT_ABSENT,
    EXIT_HUNG,
    EXIT_LOST,
    EXIT_NOT_FINITE,
    EXIT_NOT_LEARNED,
    EXIT_PREEMPTED,
    UserError,
)
from flamingo_jax.folder_lock import FolderLock

log = logging.getLogger("launch")

TICK = 0.1
HEARTBEAT_EVERY = 1.0
GRACE_SECONDS = 10.0
"""How long a child may take to exit after it has announced it, and how long process 0 waits
for the others to exit.
"""
SEEN_SECONDS = 30.0
"""How long a file written by another host may take to become visible: network storage caches
the content of folders.
"""


def supervise(
    process_info: ProcessInfo, timeouts: Timeouts, command: Sequence[str], workdir: pathlib.Path
) -> int:
    """Runs `command` as a child that is process `process_info.index` of the run.

    Returns: the exit code of this process. If the run ended for another reason than the
      child's own, the reason is printed to stderr.
    """
    return _Supervisor(process_info, timeouts, workdir).run(command)


class _Supervisor:
    def __init__(self, process_info: ProcessInfo, timeouts: Timeouts, workdir: pathlib.Path):
        self._process_info, self._timeouts, self._workdir = process_info, timeouts, workdir
        self._server = (
            _CoordinatorServer(process_info, timeouts) if process_info.index == 0 else None
        )
        self._upstream: JsonSocket | None = None
        self._said_hello = False
        self._began = self._heard = self._last_heartbeat = self._said = time.monotonic()
        self._decision: ExitDecision | None = None
        self._decided = self._began
        self._started = False
        self._announced: tuple[int, float] | None = None
        """The exit code that the child has announced, and when."""
        self._waiting: list[Message] = []
        self._saved = -timeouts.lost
        """When the child last reported progress of a save."""
        self._workdir_lock: FolderLock | None = None
        self._storage_checked: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def run(self, command: Sequence[str]) -> int:
        ours, theirs = socket.socketpair()
        environment = os.environ | {SUPERVISOR_FD: str(theirs.fileno())}
        child = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        # The child has inherited its end; closing ours lets us see when the child closes it.
        theirs.close()
        child_socket = JsonSocket(ours)
        # Forward signals to the child, which saves and exits.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: _signal(child, number))
        try:
            return self._watch(child, child_socket)
        finally:
            _signal(child, signal.SIGKILL)
            child.wait()
            child_socket.close()
            if self._upstream is not None:
                self._upstream.close()
            if self._server is not None:
                self._server.close()
            if self._workdir_lock is not None:
                self._workdir_lock.release()

    def _watch(self, child: "subprocess.Popen[bytes]", child_socket: JsonSocket) -> int:
        while True:
            now = time.monotonic()
            ended = child.poll()
            for message in child_socket.receive():
                self._from_child(message, now)
            if ended is not None and self._announced is None:
                # Before the child handles these signals they simply kill it.
                asked = ended in (-signal.SIGTERM, -signal.SIGINT)
                self._leave(EXIT_PREEMPTED if asked else ended, _describe_exit(ended), now)
            if self._server is not None:
                self._server.serve(now)
            self._connect(now)
            for message in self._upstream.receive() if self._upstream is not None else []:
                self._heard = now
                self._from_coordinator(message, child_socket)
            while not self._storage_checked.empty():
                self._report(self._storage_checked.get())
            self._time_out(now)
            code = self._code(ended, now)
            if code is not None:
                return self._finish(code)
            self._wait(child_socket)

    def _wait(self, child_socket: JsonSocket) -> None:
        with selectors.DefaultSelector() as selector:
            for json_socket in (
                child_socket,
                self._upstream,
                *([] if self._server is None else self._server.sockets()),
            ):
                if json_socket is not None and (
                    not isinstance(json_socket, JsonSocket) or json_socket.open
                ):
                    selector.register(json_socket, selectors.EVENT_READ)
            selector.select(TICK)
        if not child_socket.open:
            # A closed socket is not selected, so wait here until the child has exited.
            time.sleep(TICK / 2)

    # -- the exit code --

    def _code(self, ended: int | None, now: float) -> int | None:
        """Returns the exit code of this process, or None while it must go on."""
        announced = self._announced
        if announced is not None and announced[0] in (0, EXIT_PREEMPTED):
            # The child has finished or was preempted; one that does not exit in time is
            # killed.
            return (
                announced[0]
                if ended is not None or now - announced[1] > self._timeouts.lost
                else None
            )
        if self._decision is not None:
            # If the decision is about this child, its own message and exit code are used.
            mine = announced is not None and (
                announced[0] == self._decision.code or self._is_about_this(self._decision)
            )
            if announced is not None and mine and announced[0] > 0:
                return (
                    announced[0]
                    if ended is not None or now - announced[1] > GRACE_SECONDS
                    else None
                )
            if (
                ended is None
                and announced is None
                and now - self._decided < self._patience(self._decision)
            ):
                return None
            if ended is None and now - self._saved < self._timeouts.lost:
                # Let the child complete a save in progress: without its manifest the
                # checkpoint would be lost.
                return None
            print(f"error: {self._decision.why}", file=sys.stderr, flush=True)
            return self._decision.code
        if announced is not None and now - announced[1] > GRACE_SECONDS:
            # The coordinator has not decided in time.
            return announced[0] if announced[0] > 0 else EXIT_LOST
        return None

    def _patience(self, decision: ExitDecision) -> float:
        """Returns the seconds that the child has to exit by itself, longer for decisions after
        which it may still be saving.
        """
        if not self._started or decision.code in (EXIT_LOST, EXIT_HUNG):
            return 0.0
        return (
            self._timeouts.lost
            if decision.code in (EXIT_NOT_FINITE, EXIT_NOT_LEARNED)
            else GRACE_SECONDS
        )

    def _is_about_this(self, decision: ExitDecision) -> bool:
        return decision.index == self._process_info.index

    def _finish(self, code: int) -> int:
        """Lets process 0 serve until all other processes know how the run ends."""
        deadline = time.monotonic() + (
            self._timeouts.lost if code in (0, EXIT_PREEMPTED) else GRACE_SECONDS
        )
        if self._upstream is not None:
            self._upstream.close()
        while (
            self._server is not None and not self._server.all_left and time.monotonic() < deadline
        ):
            self._server.serve(time.monotonic())
            time.sleep(TICK)
        return code

    def _leave(self, code: int, why: str, now: float) -> None:
        self._announced = code, now
        self._report({"exit": code, "why": why})

    # -- the child --

    def _from_child(self, message: Message, now: float) -> None:
        if "exit" in message:
            self._leave(message["exit"], message["why"], now)
            return
        if "progress" in message:
            self._saved = now if message["progress"].startswith(SAVING) else -self._timeouts.lost
        self._report(message)

    # -- process 0's supervisor --

    def _report(self, message: Message) -> None:
        if self._upstream is not None and self._said_hello:
            self._upstream.send(message)
        else:
            self._waiting.append(message)

    def _connect(self, now: float) -> None:
        """Connects to the supervisor of process 0, retrying until it answers, and then sends
        heartbeats.
        """
        if self._upstream is None and self._decision is None:
            with contextlib.suppress(OSError):
                self._upstream = JsonSocket(
                    socket.create_connection(self._process_info.supervisor_address, timeout=TICK)
                )
                self._heard = now
        if self._upstream is None:
            if now - self._said > LOG_SECONDS:
                self._said = now
                log.info(
                    "waiting for process 0 of %d at %s:%d, for %.0f s",
                    self._process_info.count,
                    *self._process_info.supervisor_address,
                    now - self._began,
                )
            return
        if not self._said_hello:
            self._said_hello = True
            hello = {
                "index": self._process_info.index,
                "count": self._process_info.count,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "clock": time.time(),
            }
            self._upstream.send({"hello": hello})
            for message in self._waiting:
                self._upstream.send(message)
        if now - self._last_heartbeat >= HEARTBEAT_EVERY:
            self._last_heartbeat = now
            self._upstream.send({"heartbeat": {}})

    def _from_coordinator(self, message: Message, child_socket: JsonSocket) -> None:
        if "log" in message and self._decision is None:
            log.info("%s", message["log"])
        if "check_storage" in message:
            # In a thread, since storage that hangs must not stop the heartbeats.
            threading.Thread(
                target=self._check_storage, args=(message["check_storage"],), daemon=True
            ).start()
        if "start" in message:
            log.info(
                "all %d processes are there and agree: %s",
                len(message["start"]),
                ", ".join(message["start"]),
            )
            self._started = True
            child_socket.send({"start": True})
        if "barrier_passed" in message:
            child_socket.send(message)
        if "decision" in message and self._decision is None:
            self._decision, self._decided = ExitDecision(*message["decision"]), self._heard

    def _check_storage(self, stage: str) -> None:
        problem = (
            self._lock_workdir()
            if stage == "lock"
            else _check_storage(self._workdir, stage, self._process_info)
        )
        self._storage_checked.put({"storage_checked": stage, "problem": problem})

    def _lock_workdir(self) -> str:
        """Locks the workdir for the run. Returns the reason if that is impossible, else ""."""
        if self._process_info.index == 0:
            try:
                self._workdir_lock = FolderLock(self._workdir, "a run")
            except UserError as error:
                return f"finds that {error}"
        return ""

    def _time_out(self, now: float) -> None:
        if self._decision is not None:
            return
        where = "process 0 at {}:{}".format(*self._process_info.supervisor_address)
        if self._upstream is None:
            if now - self._began > self._timeouts.start:
                mend = "look at the logs of its host, or raise --start_timeout"
                self._decision = ExitDecision(
                    EXIT_ABSENT, f"{where} did not answer for {now - self._began:.0f} s: {mend}"
                )
        elif not self._upstream.open:
            self._decision = ExitDecision(EXIT_LOST, f"{where} died")
        elif now - self._heard > self._timeouts.lost:
            self._decision = ExitDecision(
                EXIT_LOST, f"{where} was not heard of for {now - self._heard:.0f} s"
            )


class _CoordinatorServer:
    """Connects the `Coordinator` to the supervisors of all processes; runs in process 0."""

    def __init__(self, process_info: ProcessInfo, timeouts: Timeouts):
        self._coordinator, self._address = (
            Coordinator(process_info.count, timeouts, time.monotonic()),
            process_info.address,
        )
        _, port = process_info.supervisor_address
        try:
            self._listening = socket.create_server(("", port), backlog=max(process_info.count, 128))
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen on port {port} ({error.strerror}): choose another in"
                " --coordinator"
            ) from None
        self._listening.setblocking(False)
        self._sockets: dict[JsonSocket, int | None] = {}
        self._last_heartbeat = 0.0
        self._told = False

    def sockets(self) -> list[JsonSocket | socket.socket]:
        return [self._listening, *self._sockets]

    @property
    def all_left(self) -> bool:
        return not any(
            json_socket.open for json_socket, index in self._sockets.items() if index is not None
        )

    def serve(self, now: float) -> None:
        """Accepts connections, receives messages and sends the coordinator's answers."""
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                break
            self._sockets[JsonSocket(connection)] = None
        for json_socket in list(self._sockets):
            try:
                for message in json_socket.receive():
                    self._receive(json_socket, message, now)
            except (KeyError, TypeError, ValueError):
                # A malformed message: the peer is not a process of this run.
                json_socket.close()
            if not json_socket.open:
                index = self._sockets.pop(json_socket)
                json_socket.close()
                if index is not None:
                    self._coordinator.on_disconnect(index, now)
        if not self._told:
            for to, message in self._coordinator.decide(now):
                for json_socket, index in self._sockets.items():
                    if index in to:
                        json_socket.send(message)
                self._told |= "decision" in message
        if now - self._last_heartbeat >= HEARTBEAT_EVERY:
            self._last_heartbeat = now
            for json_socket in self._sockets:
                json_socket.send({"heartbeat": {}})

    def _receive(self, json_socket: JsonSocket, message: Message, now: float) -> None:
        coordinator, index = self._coordinator, self._sockets[json_socket]
        if "hello" in message:
            hello = message["hello"]
            known = hello["index"] in self._sockets.values()
            coordinator.on_hello(
                hello["index"],
                hello["count"],
                hello["host"],
                hello["pid"],
                time.time() - hello["clock"],
                now,
            )
            if known:
                taken = ExitDecision(
                    EXIT_ABSENT,
                    f"the run at {self._address} has all its processes: wait until it has ended",
                )
                json_socket.send({"decision": dataclasses.astuple(coordinator.decision or taken)})
            elif coordinator.decision is not None:
                json_socket.send({"decision": dataclasses.astuple(coordinator.decision)})
            else:
                self._sockets[json_socket] = hello["index"]
        elif index is not None:
            if "fingerprint" in message:
                coordinator.on_fingerprint(index, message["fingerprint"], now)
            elif "storage_checked" in message:
                coordinator.on_storage_check(
                    index, message["storage_checked"], message["problem"], now
                )
            elif "heartbeat" in message:
                coordinator.on_heartbeat(index, now, **message["heartbeat"])
            elif "progress" in message:
                coordinator.on_progress(index, str(message["progress"]), now)
            elif "barrier" in message:
                coordinator.on_barrier(index, str(message["barrier"]), now)
            elif "exit" in message:
                coordinator.on_exit(index, message["exit"], message["why"], now)

    def close(self) -> None:
        self._listening.close()
        for json_socket in self._sockets:
            json_socket.close()


def _check_storage(workdir: pathlib.Path, stage: str, process_info: ProcessInfo) -> str:
    """Runs one stage of the storage check (`coordinator.STAGES`). Returns the problem, or
    "".
    """
    mine = [workdir / f".preflight-{index}" for index in range(process_info.count)]
    try:
        if stage == "write":
            paths.make_folder(workdir)
            mine[process_info.index].write_text(process_info.address)
        elif stage == "read":
            deadline = time.monotonic() + SEEN_SECONDS
            while missing := [path for path in mine if not path.exists()]:
                if time.monotonic() > deadline:
                    return (
                        f"does not see {missing[0]}, which another process wrote: put --workdir"
                        " on storage that all hosts share"
                    )
                time.sleep(TICK)
        else:
            mine[process_info.index].unlink(missing_ok=True)
    except OSError as error:
        return (
            f"cannot write to {workdir} ({error.strerror}): name a folder in --workdir that all"
            " hosts may write to"
        )
    return ""


def _signal(child: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)


def _describe_exit(code: int) -> str:
    """Describes the exit of a child in words. code: as of `subprocess.Popen.poll`."""
    if code >= 0:
        return f"it ended with exit code {code}; its log says why"
    name = signal.Signals(-code).name
    return f"it was ended by {name}" + (
        ", as the system does where memory is short" if -code == signal.SIGKILL else ""
    )
