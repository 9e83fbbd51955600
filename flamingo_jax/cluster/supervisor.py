"""A process beside each process of a run of several: it starts it, watches it, and ends it with
a sentence when the others are gone.

A process that waits for a dead one waits for ever, or is aborted by JAX's service, without a
word of which one it was. So the command starts itself once more as its child, which trains; the
parent keeps a connection to process 0's parent, which knows them all (`Register`).
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

from flamingo_jax.cluster.line import Line, Message
from flamingo_jax.cluster.link import LINK
from flamingo_jax.cluster.place import Place
from flamingo_jax.cluster.register import SAVING, SAY_EVERY, Limits, Register, Verdict
from flamingo_jax.errors import (
    EXIT_ABSENT,
    EXIT_HUNG,
    EXIT_LOST,
    EXIT_NOT_FINITE,
    EXIT_NOT_LEARNED,
    EXIT_PREEMPTED,
    UserError,
)
from flamingo_jax.holder import Holder

log = logging.getLogger("launch")

TICK = 0.1
BEAT_EVERY = 1.0
GRACE_SECONDS = 10.0
"""How long a child that has said how it ends may take to do so; and process 0 to hear that all
have.
"""
SEEN_SECONDS = 30.0
"""Until a file that another host wrote must be seen: network storage may keep what it knew for
so long.
"""


def supervise(place: Place, limits: Limits, command: Sequence[str], workdir: pathlib.Path) -> int:
    """Runs `command` as this place's process; returns the exit code, the reason on stderr where
    there is one.
    """
    return _Supervisor(place, limits, workdir).run(command)


class _Supervisor:
    def __init__(self, place: Place, limits: Limits, workdir: pathlib.Path):
        self._place, self._limits, self._workdir = place, limits, workdir
        self._desk = _Desk(place, limits) if place.index == 0 else None
        self._upstream: Line | None = None
        self._greeted = False
        self._began = self._heard = self._beaten = self._said = time.monotonic()
        self._verdict: Verdict | None = None
        self._judged = self._began
        self._started = False
        self._leaving: tuple[int, float] | None = None
        """The exit code that the child has announced, and when."""
        self._waiting: list[Message] = []
        self._saved = -limits.lost
        """When the child last told that it got on with a save."""
        self._holder: Holder | None = None
        self._probed: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def run(self, command: Sequence[str]) -> int:
        ours, theirs = socket.socketpair()
        environment = os.environ | {LINK: str(theirs.fileno())}
        child = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        below = Line(ours)
        # A signal to one of the two is for the child, which knows what to save.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: _signal(child, number))
        try:
            return self._watch(child, below)
        finally:
            _signal(child, signal.SIGKILL)
            child.wait()
            below.close()
            if self._upstream is not None:
                self._upstream.close()
            if self._desk is not None:
                self._desk.close()
            if self._holder is not None:
                self._holder.release()

    def _watch(self, child: "subprocess.Popen[bytes]", below: Line) -> int:
        while True:
            now = time.monotonic()
            ended = child.poll()
            for message in below.take():
                self._from_child(message, now)
            if ended is not None and self._leaving is None:
                # Until it listens to these they end it outright.
                asked = ended in (-signal.SIGTERM, -signal.SIGINT)
                self._leave(EXIT_PREEMPTED if asked else ended, _how(ended), now)
            if self._desk is not None:
                self._desk.turn(now)
            self._reach(now)
            for message in self._upstream.take() if self._upstream is not None else []:
                self._heard = now
                self._from_above(message, below)
            while not self._probed.empty():
                self._up(self._probed.get())
            self._time_out(now)
            code = self._code(ended, now)
            if code is not None:
                return self._finish(code)
            self._wait(below)

    def _wait(self, below: Line) -> None:
        with selectors.DefaultSelector() as selector:
            for line in (
                below,
                self._upstream,
                *([] if self._desk is None else self._desk.lines()),
            ):
                if line is not None and (not isinstance(line, Line) or line.open):
                    selector.register(line, selectors.EVENT_READ)
            selector.select(TICK)
        if not below.open:
            # Nothing will wake it any more until the child's end is seen.
            time.sleep(TICK / 2)

    # -- how it ends --

    def _code(self, ended: int | None, now: float) -> int | None:
        """The exit code once it is known, and None until then."""
        announced = self._leaving
        if announced is not None and announced[0] in (0, EXIT_PREEMPTED):
            # Well ended; a child that does not come to its end is ended.
            return (
                announced[0]
                if ended is not None or now - announced[1] > self._limits.lost
                else None
            )
        if self._verdict is not None:
            # It has said, or is about to say, so itself.
            mine = announced is not None and (
                announced[0] == self._verdict.code or self._named(self._verdict)
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
                and now - self._judged < self._patience(self._verdict)
            ):
                return None
            if ended is None and now - self._saved < self._limits.lost:
                # All of that checkpoint is on disk but its manifest, without which it counts
                # for nothing.
                return None
            print(f"error: {self._verdict.why}", file=sys.stderr, flush=True)
            return self._verdict.code
        if announced is not None and now - announced[1] > GRACE_SECONDS:
            # Nobody is left to ask.
            return announced[0] if announced[0] > 0 else EXIT_LOST
        return None

    def _patience(self, verdict: Verdict) -> float:
        """Seconds for the child to end by itself: what ends all processes at the same step may
        find it in the middle of its last save.
        """
        if not self._started or verdict.code in (EXIT_LOST, EXIT_HUNG):
            return 0.0
        return (
            self._limits.lost
            if verdict.code in (EXIT_NOT_FINITE, EXIT_NOT_LEARNED)
            else GRACE_SECONDS
        )

    def _named(self, verdict: Verdict) -> bool:
        return verdict.index == self._place.index

    def _finish(self, code: int) -> int:
        """Process 0 waits until all have heard how the run ends."""
        deadline = time.monotonic() + (
            self._limits.lost if code in (0, EXIT_PREEMPTED) else GRACE_SECONDS
        )
        if self._upstream is not None:
            self._upstream.close()
        while self._desk is not None and not self._desk.deserted and time.monotonic() < deadline:
            self._desk.turn(time.monotonic())
            time.sleep(TICK)
        return code

    def _leave(self, code: int, why: str, now: float) -> None:
        self._leaving = code, now
        self._up({"left": code, "why": why})

    # -- the child --

    def _from_child(self, message: Message, now: float) -> None:
        if "left" in message:
            self._leave(message["left"], message["why"], now)
            return
        if "work" in message:
            self._saved = now if message["work"].startswith(SAVING) else -self._limits.lost
        self._up(message)

    # -- process 0's desk --

    def _up(self, message: Message) -> None:
        if self._upstream is not None and self._greeted:
            self._upstream.send(message)
        else:
            self._waiting.append(message)

    def _reach(self, now: float) -> None:
        """Connects to the desk, tries again until it is there, and shows it that this process
        lives.
        """
        if self._upstream is None and self._verdict is None:
            with contextlib.suppress(OSError):
                self._upstream = Line(socket.create_connection(self._place.meeting, timeout=TICK))
                self._heard = now
        if self._upstream is None:
            if now - self._said > SAY_EVERY:
                self._said = now
                log.info(
                    "waiting for process 0 of %d at %s:%d, for %.0f s",
                    self._place.count,
                    *self._place.meeting,
                    now - self._began,
                )
            return
        if not self._greeted:
            self._greeted = True
            hello = {
                "index": self._place.index,
                "count": self._place.count,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "clock": time.time(),
            }
            self._upstream.send({"hello": hello})
            for message in self._waiting:
                self._upstream.send(message)
        if now - self._beaten >= BEAT_EVERY:
            self._beaten = now
            self._upstream.send({"beat": {}})

    def _from_above(self, message: Message, below: Line) -> None:
        if "say" in message and self._verdict is None:
            log.info("%s", message["say"])
        if "probe" in message:
            # Storage that does not answer must not keep this process from showing that it
            # lives.
            threading.Thread(target=self._probe, args=(message["probe"],), daemon=True).start()
        if "go" in message:
            log.info(
                "all %d processes are there and agree: %s",
                len(message["go"]),
                ", ".join(message["go"]),
            )
            self._started = True
            below.send({"go": True})
        if "met" in message:
            below.send(message)
        if "end" in message and self._verdict is None:
            self._verdict, self._judged = Verdict(*message["end"]), self._heard

    def _probe(self, stage: str) -> None:
        problem = self._hold() if stage == "hold" else _probe(self._workdir, stage, self._place)
        self._probed.put({"probed": stage, "problem": problem})

    def _hold(self) -> str:
        """Makes the run the workdir's holder; why it cannot be, or ""."""
        if self._place.index == 0:
            try:
                self._holder = Holder(self._workdir, "a run")
            except UserError as error:
                return f"finds that {error}"
        return ""

    def _time_out(self, now: float) -> None:
        if self._verdict is not None:
            return
        where = "process 0 at {}:{}".format(*self._place.meeting)
        if self._upstream is None:
            if now - self._began > self._limits.start:
                mend = "look at the logs of its host, or raise --start_timeout"
                self._verdict = Verdict(
                    EXIT_ABSENT, f"{where} did not answer for {now - self._began:.0f} s: {mend}"
                )
        elif not self._upstream.open:
            self._verdict = Verdict(EXIT_LOST, f"{where} died")
        elif now - self._heard > self._limits.lost:
            self._verdict = Verdict(
                EXIT_LOST, f"{where} was not heard of for {now - self._heard:.0f} s"
            )


class _Desk:
    """Where all supervisors call: process 0's part of it."""

    def __init__(self, place: Place, limits: Limits):
        self._register, self._address = (
            Register(place.count, limits, time.monotonic()),
            place.address,
        )
        _, port = place.meeting
        try:
            self._listening = socket.create_server(("", port), backlog=max(place.count, 128))
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen on port {port} ({error.strerror}): choose another in"
                " --coordinator"
            ) from None
        self._listening.setblocking(False)
        self._lines: dict[Line, int | None] = {}
        self._beaten = 0.0
        self._told = False

    def lines(self) -> list[Line | socket.socket]:
        return [self._listening, *self._lines]

    @property
    def deserted(self) -> bool:
        return not any(line.open for line, index in self._lines.items() if index is not None)

    def turn(self, now: float) -> None:
        """Hears who has something to say and answers."""
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                break
            self._lines[Line(connection)] = None
        for line in list(self._lines):
            try:
                for message in line.take():
                    self._hear(line, message, now)
            except (KeyError, TypeError, ValueError):
                # Whoever this is, it is no process of the run.
                line.close()
            if not line.open:
                index = self._lines.pop(line)
                line.close()
                if index is not None:
                    self._register.vanished(index, now)
        if not self._told:
            for to, message in self._register.decide(now):
                for line, index in self._lines.items():
                    if index in to:
                        line.send(message)
                self._told |= "end" in message
        if now - self._beaten >= BEAT_EVERY:
            self._beaten = now
            for line in self._lines:
                line.send({"beat": {}})

    def _hear(self, line: Line, message: Message, now: float) -> None:
        register, index = self._register, self._lines[line]
        if "hello" in message:
            hello = message["hello"]
            known = hello["index"] in self._lines.values()
            register.arrived(
                hello["index"],
                hello["count"],
                hello["host"],
                hello["pid"],
                time.time() - hello["clock"],
                now,
            )
            if known:
                taken = Verdict(
                    EXIT_ABSENT,
                    f"the run at {self._address} has all its processes: wait until it has ended",
                )
                line.send({"end": dataclasses.astuple(register.verdict or taken)})
            elif register.verdict is not None:
                line.send({"end": dataclasses.astuple(register.verdict)})
            else:
                self._lines[line] = hello["index"]
        elif index is not None:
            if "facts" in message:
                register.told(index, message["facts"], now)
            elif "probed" in message:
                register.probed(index, message["probed"], message["problem"], now)
            elif "beat" in message:
                register.beat(index, now, **message["beat"])
            elif "work" in message:
                register.works(index, str(message["work"]), now)
            elif "meet" in message:
                register.meets(index, str(message["meet"]), now)
            elif "left" in message:
                register.left(index, message["left"], message["why"], now)

    def close(self) -> None:
        self._listening.close()
        for line in self._lines:
            line.close()


def _probe(workdir: pathlib.Path, stage: str, place: Place) -> str:
    """One stage of the look at the storage; what is wrong with it, or ""."""
    mine = [workdir / f".preflight-{index}" for index in range(place.count)]
    try:
        if stage == "write":
            workdir.mkdir(parents=True, exist_ok=True)
            mine[place.index].write_text(place.address)
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
            mine[place.index].unlink(missing_ok=True)
    except OSError as error:
        return (
            f"cannot write to {workdir} ({error.strerror}): name a folder in --workdir that all"
            " hosts may write to"
        )
    return ""


def _signal(child: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)


def _how(code: int) -> str:
    """A child's end in words."""
    if code >= 0:
        return f"it ended with exit code {code}; its log says why"
    name = signal.Signals(-code).name
    return f"it was ended by {name}" + (
        ", as the system does where memory is short" if -code == signal.SIGKILL else ""
    )
