"""Decides what happens to a run from the messages of its processes: which process is missing,
which differs, which has died, which slows the others down.

Contains decisions only, neither sockets nor a clock, so that tests can drive it: every method
is given the time, and `decide` returns the messages to send. Times are in seconds.
"""

import dataclasses
import signal
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from flamingo_jax.distributed.fingerprint import first_difference
from flamingo_jax.distributed.json_socket import Message
from flamingo_jax.errors import (
    EXIT_ABSENT,
    EXIT_BAD_INPUT,
    EXIT_HUNG,
    EXIT_LOST,
    EXIT_PREEMPTED,
    EXIT_SAVE_FAILED,
)

LOG_SECONDS = 10.0
"""Seconds between log messages that name the processes that are waited for."""
CLOCK_SECONDS = 60.0
"""The largest allowed difference between the clocks of two hosts: file times are compared to
see which file is newer.
"""
SETTLE_SECONDS = 2.0
"""How long to wait before a failure is taken for the cause: a process may fail because another
has died, and the message about that may arrive later.
"""
SLOW_CHECK_SECONDS = 30.0
"""Seconds between checks for a process that slows the others down."""
FEWEST_STEPS = 5
"""Steps that all processes must have reported before one of them is called late."""
MIN_SLOWDOWN = 0.1
"""The fraction of the time that a process must slow the others down to be named."""

STARTING = "starting"
SAVING = "saving"
"""Begins the description of the work of a process that saves: "saving step 12"."""
END = "the end of the run"
"""The barrier at the end of a run, after which processes may exit in any order."""


class Timeouts(NamedTuple):
    """Time limits in seconds.

    start: until all processes have connected. lost: without a message from a process. step:
    without the end of a step, or without progress in reading or writing between steps.
    """

    start: float = 600.0
    lost: float = 60.0
    step: float = 1800.0


@dataclasses.dataclass
class Peer:
    """Holds the last known state of one process. Times are those of the coordinator."""

    index: int
    host: str
    pid: int
    heard: float
    fingerprint: dict[str, Any] | None = None
    probed: str | None = None
    """The last stage of the storage check that it has completed."""
    step: int = 0
    phase: str = STARTING
    since: float = 0.0
    """When step, phase or progress changed last."""
    waited: float = 0.0
    """Seconds it waited for data."""
    waited_before: float = 0.0
    """`waited` at the last check for a slow process."""
    work: str = ""
    """What it is reading or writing, such as "saving step 12"; "" for nothing."""
    left: bool = False

    def __str__(self) -> str:
        return f"process {self.index} ({self.host}, pid {self.pid})"

    @property
    def doing(self) -> str:
        """Returns what the process does, for messages: its work, else its phase."""
        return self.work or self.phase


@dataclasses.dataclass(frozen=True)
class ExitDecision:
    """Holds the exit code of the run and the reason for it. index: the process that caused it,
    -1 for none.
    """

    code: int
    why: str
    index: int = -1


STAGES = ("lock", "write", "read", "clear")
"""Stages of the storage check. Process 0 locks the workdir; then every process writes a file,
looks for the files of all others, and removes its own. A stage begins when all processes have
completed the one before.
"""


class Coordinator:
    """Takes in messages (`on_*`) and decides what to send (`decide`). `decision` is set once
    the run must end.
    """

    def __init__(self, count: int, timeouts: Timeouts, now: float):
        self._count, self._timeouts, self._began = count, timeouts, now
        self._peers: dict[int, Peer] = {}
        self._stage: int | None = None
        self._running = False
        self._waiting: dict[str, set[int]] = {}
        """{name of a barrier: processes that wait there}."""
        self._finished = False
        self._said = now
        self._suspected: tuple[float, int, ExitDecision] | None = None
        self._first_left: tuple[float, int, str] | None = None
        self._looked = now
        self._arrivals: dict[int, dict[int, float]] = {}
        self.decision: ExitDecision | None = None

    # -- messages of the processes --

    def on_hello(
        self, index: int, count: int, host: str, pid: int, behind: float, now: float
    ) -> None:
        """Takes in a process that has connected. behind: seconds that its clock is behind.

        Ignored once the run has started, since then it has all its processes.
        """
        peer = Peer(index, host, pid, heard=now, since=now)
        if self._running:
            return
        if index in self._peers:
            both = f"{self._peers[index]} and {peer}"
            return self._end(
                EXIT_BAD_INPUT,
                f"{both} say that they are the same one: give every process its own --process",
            )
        if count != self._count or not 0 <= index < self._count:
            return self._end(
                EXIT_BAD_INPUT,
                f"{peer} was started as one of {count}, process 0 as one of {self._count}:"
                " start all with the same --processes",
            )
        self._peers[index] = peer
        if abs(behind) > CLOCK_SECONDS:
            way = "behind" if behind > 0 else "ahead of"
            mend = "set it (NTP): what is newer is told by files' times"
            self._end(
                EXIT_BAD_INPUT,
                f"the clock of {peer} is {abs(behind):,.0f} s {way} that of process 0: {mend}",
            )

    def on_fingerprint(self, index: int, fingerprint: dict[str, Any], now: float) -> None:
        """Takes in the fingerprint of a process (`fingerprint.run_fingerprint`)."""
        peer = self._peers[index]
        peer.fingerprint, peer.heard, peer.since = fingerprint, now, now

    def on_storage_check(self, index: int, stage: str, problem: str, now: float) -> None:
        """Takes in that a process has completed a stage of the storage check. problem: what it
        found to be wrong, "" for nothing.
        """
        peer = self._peers[index]
        peer.probed, peer.heard = stage, now
        if problem:
            self._end(EXIT_BAD_INPUT, f"{peer} {problem}")

    def on_heartbeat(
        self,
        index: int,
        now: float,
        step: int | None = None,
        phase: str = "",
        waited: float = 0.0,
    ) -> None:
        """Takes in a heartbeat, with step and phase if it comes from the training process."""
        peer = self._peers[index]
        peer.heard = now
        if step is None:
            return
        if (step, phase) != (peer.step, peer.phase):
            peer.since = now
        if step != peer.step:
            self._arrivals.setdefault(step, {})[index] = now
        peer.step, peer.phase, peer.waited = step, phase, waited

    def on_progress(self, index: int, what: str, now: float) -> None:
        """Takes in progress of a process in reading or writing; `what` is "" when that is
        done.
        """
        peer = self._peers[index]
        peer.work, peer.heard, peer.since = what, now, now

    def on_barrier(self, index: int, where: str, now: float) -> None:
        """Takes in that a process waits at the barrier `where`."""
        self._peers[index].heard = now
        self._waiting.setdefault(where, set()).add(index)

    def on_exit(self, index: int, code: int, why: str, now: float) -> None:
        """Takes in that a process has exited, or is about to, with this code and reason."""
        peer = self._peers[index]
        if peer.left:
            return
        peer.left = True
        if code in (0, EXIT_PREEMPTED):
            if self._running:
                self._first_left = self._first_left or (
                    now,
                    code,
                    f"{peer} ended at step {peer.step}, and others did not",
                )
            else:
                self._end(code, f"{peer} was stopped before all had started")
        elif code in (EXIT_SAVE_FAILED, 1) or code < 0:
            # These may be consequences: when another process dies, saves and collectives fail
            # and JAX's coordination service aborts (SIGABRT). A signal other than SIGABRT is
            # the most likely cause, then a failed save, then a traceback.
            likely = (
                2 if code < 0 and code != -signal.SIGABRT else 1 if code == EXIT_SAVE_FAILED else 0
            )
            self._suspect(
                now,
                likely,
                ExitDecision(
                    code if code == EXIT_SAVE_FAILED else EXIT_LOST,
                    f"{peer} stopped: {why}",
                    index,
                ),
            )
        else:
            self._end(code, f"{peer} stopped: {why}", index)

    def on_disconnect(self, index: int, now: float) -> None:
        """Takes in that a connection has closed. Without an exit message, the process died."""
        peer = self._peers[index]
        if not peer.left:
            peer.left = True
            self._end(EXIT_LOST, f"{peer} died at step {peer.step} ({peer.doing})", index)

    # -- decisions --

    def decide(self, now: float) -> Iterator[tuple[Sequence[int], Message]]:
        """Yields (indices of the receivers, message) for every message to send now."""
        present = [index for index, peer in self._peers.items() if not peer.left]
        if self.decision is None:
            self._time_out(now)
        if self._suspected is not None and now - self._suspected[0] >= SETTLE_SECONDS:
            self._end(*dataclasses.astuple(self._suspected[2]))
        if self.decision is not None:
            # Also to supervisors whose child has exited, which wait for the decision.
            yield list(self._peers), {"decision": dataclasses.astuple(self.decision)}
        elif self._running:
            # Training: release complete barriers, and look for slow processes.
            for where in [where for where, who in self._waiting.items() if len(who) == self._count]:
                del self._waiting[where]
                self._finished |= where == END
                yield present, {"barrier_passed": where}
            if now - self._looked >= SLOW_CHECK_SECONDS:
                yield from (([0], {"log": sentence}) for sentence in self._slow_processes(now))
        elif self._stage is not None:
            # Storage check: begin the next stage when all have completed this one.
            if all(peer.probed == STAGES[self._stage] for peer in self._peers.values()):
                yield from self._next_stage(present, now)
        elif len(self._peers) == self._count and all(
            peer.fingerprint is not None for peer in self._peers.values()
        ):
            # All processes are connected: compare their fingerprints, then check the storage.
            different = first_difference(
                {
                    str(peer): peer.fingerprint
                    for _, peer in sorted(self._peers.items())
                    if peer.fingerprint is not None
                }
            )
            if different:
                self._end(EXIT_BAD_INPUT, different)
                yield from self.decide(now)
            else:
                self._stage = -1
                yield from self._next_stage(present, now)
        elif now - self._said >= LOG_SECONDS:
            # Still waiting for processes: log which ones are missing.
            self._said = now
            yield present, {"log": f"waiting for {self._missing()}, for {now - self._began:.0f} s"}

    def _next_stage(
        self, present: Sequence[int], now: float
    ) -> Iterator[tuple[Sequence[int], Message]]:
        assert self._stage is not None
        self._stage += 1
        if self._stage < len(STAGES):
            yield present, {"check_storage": STAGES[self._stage]}
        else:
            self._running, self._stage, self._looked = True, None, now
            for peer in self._peers.values():
                peer.since = now
            yield present, {"start": [str(peer) for _, peer in sorted(self._peers.items())]}

    def _missing(self) -> str:
        absent = [index for index in range(self._count) if index not in self._peers]
        unready = [str(peer) for peer in self._peers.values() if peer.fingerprint is None]
        stage = None if self._stage is None else STAGES[self._stage]
        blind = [str(peer) for peer in self._peers.values() if stage not in (None, peer.probed)]
        parts = []
        if absent:
            which = (
                f"process {absent[0]}"
                if len(absent) == 1
                else f"processes {', '.join(map(str, absent[:-1]))} and {absent[-1]}"
            )
            parts.append(f"{which} of {self._count}, which did not arrive")
        if unready:
            parts.append(f"{', '.join(unready)} to read the config")
        if blind:
            parts.append(f"{', '.join(blind)} to look at the storage of --workdir")
        return " and ".join(parts) or "all to look at the storage"

    def _time_out(self, now: float) -> None:
        here = [peer for peer in self._peers.values() if not peer.left]
        saving = any(peer.work.startswith(SAVING) for peer in here)
        if here and self._first_left is not None and not self._finished and not saving:
            since, code, why = self._first_left
            if now - since > self._timeouts.lost:
                # One process has finished and others have not: this is not a normal end.
                return self._end(code or EXIT_LOST, why)
        for peer in here:
            if now - peer.heard > self._timeouts.lost:
                return self._end(
                    EXIT_LOST,
                    f"{peer} was not heard of for {now - peer.heard:.0f} s; its last step"
                    f" was {peer.step} ({peer.doing})",
                )
        if not self._running:
            if now - self._began > self._timeouts.start:
                mend = "look at the logs of its host, or raise --start_timeout"
                self._end(
                    EXIT_ABSENT,
                    f"gave up after {now - self._began:.0f} s of waiting for {self._missing()}:"
                    f" {mend}",
                )
            return
        # A process that waits at a barrier is not to blame, and as long as one of the others
        # makes progress, the run does.
        waiting = set().union(*self._waiting.values())
        busy = [peer for peer in here if peer.index not in waiting] or here
        if busy and all(self._stuck(peer, now) for peer in busy):
            first = min(busy, key=lambda peer: (peer.step, peer.since))
            level = (
                "all are there"
                if len({peer.step for peer in here}) == 1
                else f"others are at step {max(peer.step for peer in here)}"
            )
            self._end(
                EXIT_HUNG,
                f"no step ended for {now - first.since:.0f} s: {first} is at step {first.step}"
                f" ({first.doing}), {level}; look at its host, or raise --step_timeout",
            )

    def _stuck(self, peer: Peer, now: float) -> bool:
        """Returns whether a process has made no progress within the limit. Before the first
        step only reading and writing have a limit, since there may be much to prepare."""
        limited = peer.phase != STARTING or bool(peer.work)
        return limited and now - peer.since > self._timeouts.step

    def _slow_processes(self, now: float) -> Iterator[str]:
        """Yields a sentence for each process that slows the others down: it waits for its
        data, or reaches its steps later than they do.
        """
        window, self._looked = now - self._looked, now
        peers = [peer for _, peer in sorted(self._peers.items())]
        waits = {peer.index: (peer.waited - peer.waited_before) / window for peer in peers}
        for peer in peers:
            peer.waited_before = peer.waited
        # Steps that all processes have reported, with their times of arrival.
        together = {
            step: times for step, times in self._arrivals.items() if len(times) == self._count
        }
        steps = max(together, default=0) - min(together, default=0)
        lags = {peer.index: 0.0 for peer in peers}
        if len(together) >= FEWEST_STEPS:
            seconds = (
                max(min(times.values()) for times in together.values())
                - min(min(times.values()) for times in together.values())
            ) / steps
            for peer in peers:
                lags[peer.index] = statistics.median(
                    times[peer.index] - min(times.values()) for times in together.values()
                ) / max(seconds, 1e-9)
        newest = max((peer.step for peer in peers), default=0)
        self._arrivals = {
            step: times
            for step, times in self._arrivals.items()
            if step >= newest - 1 and len(times) < self._count
        }
        # A process is slow if it loses much more time than the median of the others.
        for shares, what in ((waits, "waits for its data"), (lags, "comes later to its steps")):
            for peer in peers:
                others = (
                    statistics.median(
                        share for index, share in shares.items() if index != peer.index
                    )
                    if len(peers) > 1
                    else 0.0
                )
                if shares[peer.index] > max(MIN_SLOWDOWN, 3 * others):
                    yield (
                        f"{peer} holds the others up: {shares[peer.index]:.0%} of the time"
                        f" it {what}"
                    )

    def _suspect(self, now: float, likely: int, decision: ExitDecision) -> None:
        """Remembers, of several failures, the one that most likely caused the others, and of
        equally likely ones the first.
        """
        if self._suspected is None or likely > self._suspected[1]:
            self._suspected = self._suspected[0] if self._suspected else now, likely, decision

    def _end(self, code: int, why: str, index: int = -1) -> None:
        if self.decision is None:
            self.decision = ExitDecision(code, why, index)
