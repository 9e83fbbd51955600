"""What process 0's supervisor knows of all processes, and what follows from it: who is missing,
who differs, who is gone, who holds the others up.

Only decisions, no sockets and no clock: `decide` is given the time and gives messages to send.
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

SAY_EVERY = 10.0
"""Seconds between words on whom all wait for."""
CLOCK_SECONDS = 60.0
"""The most that two hosts' clocks may differ: what is newer than what is told by files' times.
"""
SETTLE_SECONDS = 2.0
"""A process that fails may do so because another died: word of that may take as long to arrive.
"""
LOOK_EVERY = 30.0
"""Seconds between looks for one that holds the others up."""
FEWEST_STEPS = 5
"""Steps that all have told of, before one is said to be late."""
HELD_UP = 0.1
"""The share of the time that one must hold the others up to be named."""

STARTING = "starting"
SAVING = "saving"
"""What the work of a process that saves is called: "saving step 12"."""
END = "the end of the run"
"""Where all meet before one of them may leave: none is needed any more."""


class Timeouts(NamedTuple):
    """Limits in seconds: until all have arrived; without a word of a process; without the end
    of a step, or progress of what a process reads or writes between steps.
    """

    start: float = 600.0
    lost: float = 60.0
    step: float = 1800.0


@dataclasses.dataclass
class Peer:
    """Holds what is known of one process."""

    index: int
    host: str
    pid: int
    heard: float
    fingerprint: dict[str, Any] | None = None
    probed: str | None = None
    """The last stage of the look at the storage that it ended."""
    step: int = 0
    phase: str = STARTING
    since: float = 0.0
    """When step or phase changed last."""
    waited: float = 0.0
    """Seconds it waited for data."""
    waited_before: float = 0.0
    """The same at the last look for one that holds the others up."""
    work: str = ""
    """What it reads or writes beside its phase, as "saving step 12"; it tells as it gets on."""
    left: bool = False

    def __str__(self) -> str:
        return f"process {self.index} ({self.host}, pid {self.pid})"

    @property
    def doing(self) -> str:
        return self.work or self.phase


@dataclasses.dataclass(frozen=True)
class ExitDecision:
    """Tells why the run ends for all, and with which exit code. index: of the process that is the
    reason, -1 for none.
    """

    code: int
    why: str
    index: int = -1


STAGES = ("lock", "write", "read", "clear")
"""Of the look at the storage: process 0 locks the workdir for the run, every process
writes a file, looks for everyone's, and removes its own; nobody goes on before all have.
"""


class Coordinator:
    """Decides what the processes of a run are told. `decision` is why it ends for all, once that is
    known.
    """

    def __init__(self, count: int, timeouts: Timeouts, now: float):
        self._count, self._timeouts, self._began = count, timeouts, now
        self._peers: dict[int, Peer] = {}
        self._stage: int | None = None
        self._running = False
        self._waiting: dict[str, set[int]] = {}
        """Who waits for all others, by the place where."""
        self._finished = False
        self._said = now
        self._suspected: tuple[float, int, ExitDecision] | None = None
        self._first_left: tuple[float, int, str] | None = None
        self._looked = now
        self._arrivals: dict[int, dict[int, float]] = {}
        self._lags: dict[int, list[float]] = {}
        self.decision: ExitDecision | None = None

    # -- what is heard --

    def on_hello(
        self, index: int, count: int, host: str, pid: int, behind: float, now: float
    ) -> None:
        """Takes in that a process has called. behind: seconds that its clock is behind this one's.

        One that calls a run that has all its processes is not of it.
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
        """Takes in what all processes must agree on (see `fingerprint`)."""
        peer = self._peers[index]
        peer.fingerprint, peer.heard, peer.since = fingerprint, now, now

    def on_storage_check(self, index: int, stage: str, problem: str, now: float) -> None:
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
        """Takes in a sign of life, with the training's progress where there is some."""
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
        """Takes in that a process got on with what it reads or writes; "" once that is done."""
        peer = self._peers[index]
        peer.work, peer.heard, peer.since = what, now, now

    def on_barrier(self, index: int, where: str, now: float) -> None:
        """Takes in that a process, or a thread of it, waits for all others to come to the same
        place of its program.
        """
        self._peers[index].heard = now
        self._waiting.setdefault(where, set()).add(index)

    def on_exit(self, index: int, code: int, why: str, now: float) -> None:
        """Takes in that a process has ended, or is about to, and how."""
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
            # A save, a collective or JAX's service (which aborts) fails as well when another
            # process has died.
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
        """Takes in that a connection broke without a word before."""
        peer = self._peers[index]
        if not peer.left:
            peer.left = True
            self._end(EXIT_LOST, f"{peer} died at step {peer.step} ({peer.doing})", index)

    # -- what follows --

    def decide(self, now: float) -> Iterator[tuple[Sequence[int], Message]]:
        """Yields (to whom, what) for all that is to be said at this time."""
        present = [index for index, peer in self._peers.items() if not peer.left]
        if self.decision is None:
            self._time_out(now)
        if self._suspected is not None and now - self._suspected[0] >= SETTLE_SECONDS:
            self._end(*dataclasses.astuple(self._suspected[2]))
        if self.decision is not None:
            # Also to those whose child has ended: they wait to hear why.
            yield list(self._peers), {"decision": dataclasses.astuple(self.decision)}
        elif self._running:
            for where in [where for where, who in self._waiting.items() if len(who) == self._count]:
                del self._waiting[where]
                self._finished |= where == END
                yield present, {"barrier_passed": where}
            if now - self._looked >= LOOK_EVERY:
                yield from (([0], {"log": sentence}) for sentence in self._held_up(now))
        elif self._stage is not None:
            if all(peer.probed == STAGES[self._stage] for peer in self._peers.values()):
                yield from self._next_stage(present, now)
        elif len(self._peers) == self._count and all(
            peer.fingerprint is not None for peer in self._peers.values()
        ):
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
        elif now - self._said >= SAY_EVERY:
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
                # Not all have done what they had to: this is no good end of the run.
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
        # Who waits for the others is not to blame, and while one of them gets on, all do. Until
        # its first step a process may have much to read and to encode.
        waiting = set().union(*self._waiting.values())
        busy = [peer for peer in here if peer.index not in waiting] or here
        if busy and all(self._stuck(peer, now) for peer in busy):
            first = min(busy, key=lambda peer: (peer.step, peer.since))
            level = (
                "all are there"
                if len({peer.step for peer in here}) == 1
                else f"others are at step {max(peer.step for member in here)}"
            )
            self._end(
                EXIT_HUNG,
                f"no step ended for {now - first.since:.0f} s: {first} is at step {first.step}"
                f" ({first.doing}), {level}; look at its host, or raise --step_timeout",
            )

    def _stuck(self, peer: Peer, now: float) -> bool:
        """Tells whether it has not got on for too long with what has a limit."""
        limited = peer.phase != STARTING or bool(peer.work)
        return limited and now - peer.since > self._timeouts.step

    def _held_up(self, now: float) -> Iterator[str]:
        """Yields a sentence for each process that holds the others up: by its data, or by coming to
        its steps later than they do.
        """
        window, self._looked = now - self._looked, now
        peers = [peer for _, peer in sorted(self._peers.items())]
        waits = {peer.index: (peer.waited - peer.waited_before) / window for peer in peers}
        for peer in peers:
            peer.waited_before = peer.waited
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
        for shares, what in ((waits, "waits for its data"), (lags, "comes later to its steps")):
            for peer in peers:
                others = (
                    statistics.median(
                        share for index, share in shares.items() if index != peer.index
                    )
                    if len(peers) > 1
                    else 0.0
                )
                if shares[peer.index] > max(HELD_UP, 3 * others):
                    yield (
                        f"{peer} holds the others up: {shares[peer.index]:.0%} of the time"
                        f" it {what}"
                    )

    def _suspect(self, now: float, likely: int, decision: ExitDecision) -> None:
        """Keeps of several failures the likeliest to be the reason of the others, and the first of
        these.
        """
        if self._suspected is None or likely > self._suspected[1]:
            self._suspected = self._suspected[0] if self._suspected else now, likely, decision

    def _end(self, code: int, why: str, index: int = -1) -> None:
        if self.decision is None:
            self.decision = ExitDecision(code, why, index)
