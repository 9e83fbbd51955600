"""Answers that come token by token, for several callers at once.

One thread per model runs the device for all of its streams: each stream has a row of a pool
(`scheduler.RowPool`), and all rows advance together, so that callers share the weights that
every token reads. Waiting streams get rows in the order in which they came. The thread starts
with a stream and ends when there is none, and with it its cache.
"""

import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from flamingo_jax.errors import UserError
from flamingo_jax.inference.completion import Completion
from flamingo_jax.inference.prompts import bucket_length, next_power, visual_slots
from flamingo_jax.inference.scheduler import CHUNK, Answer, RowPool, RowPrograms, StreamedToken

MOST_ROWS = 16
"""Streams that share a pool; further ones wait."""
LEAST_SLOTS = 128
"""The least length of a pool's cache; longer ones are powers of 2, for few compiled shapes."""
CHUNK_SECONDS = 0.05
"""Several tokens are decoded at a time where all of them together take less than this."""

Event = StreamedToken | Completion | BaseException
"""What the scheduler's thread sends: tokens, and in the end the completion or an error."""


class TextStream:
    """An iterator over the tokens of an answer. `Model.stream` makes it.

    A stream that is cancelled, or no longer referred to, leaves its place to others. One thread
    should read a stream; different streams may be read by different threads.
    """

    def __init__(self, answer: Answer, events: queue.SimpleQueue[Event]):
        self._answer, self._events = answer, events
        self._completion: Completion | None = None
        self._given: list[StreamedToken] = []
        weakref.finalize(self, _cancel, answer)

    def __iter__(self) -> "TextStream":
        return self

    def __next__(self) -> StreamedToken:
        """Waits for the next token.

        Raises: StopIteration at the answer's end; what went wrong, if something did.
        """
        if self._completion is not None:
            raise StopIteration
        event = self._events.get()
        if isinstance(event, BaseException):
            self._end()
            raise event
        if self._completion is not None:  # Cancelled by another thread while this one waited.
            raise StopIteration
        if isinstance(event, Completion):
            self._completion = event
            raise StopIteration
        self._given.append(event)
        return event

    def cancel(self) -> None:
        """Ends the stream; its completion is what was read until now."""
        _cancel(self._answer)
        if self._completion is None:
            # Also wakes a thread that waits for the next token.
            self._events.put(self._end())

    @property
    def completion(self) -> Completion:
        """Returns the whole answer.

        Raises: UserError before its end.
        """
        if self._completion is None:
            raise UserError(
                "a stream's completion was asked for before its end: read its tokens first, or"
                " cancel it"
            )
        return self._completion

    def _end(self) -> Completion:
        """Makes the completion of the tokens that were read."""
        given = list(self._given)
        self._completion = Completion(
            "".join(token.text for token in given),
            sum(token.log_probability for token in given),
            False,
            tuple(token.token for token in given),
        )
        return self._completion


def _send(answer: Answer, event: Any) -> None:
    assert answer.emit is not None
    answer.emit(event)


def _cancel(answer: Answer) -> None:
    answer.cancelled = True


class StreamScheduler:
    """Writes the answers of all streams of a model.

    Args:
      to_completion: makes the result of an answer that has ended.
    """

    def __init__(self, programs: RowPrograms, to_completion: Callable[[Answer], Completion]):
        self._programs, self._to_completion = programs, to_completion
        self._lock = threading.Lock()
        self._waiting: list[Answer] = []
        self._running = False

    def submit(self, answer: Answer) -> TextStream:
        """Starts to write an answer, and returns the stream of its tokens."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        answer.emit = events.put
        with self._lock:
            self._waiting.append(answer)
            if not self._running:
                self._running = True
                # Not a daemon: an interpreter that ends while a daemon runs XLA may crash.
                threading.Thread(target=self._run, name="streams").start()
        return TextStream(answer, events)

    def _run(self) -> None:
        """Runs until no stream is left. What fails is raised by the streams that it concerns."""
        pools: dict[tuple[int, int], _Streams] = {}
        while self._receive(pools):
            for key, pool in list(pools.items()):
                try:
                    for answer in pool.advance():
                        _send(answer, self._to_completion(answer))
                except BaseException as error:  # noqa: BLE001 - it belongs to the callers
                    for answer in pools.pop(key).all():
                        _send(answer, error)

    def _receive(self, pools: "dict[tuple[int, int], _Streams]") -> bool:
        """Gives new answers to their pools, and returns whether there is anything to do."""
        with self._lock:
            for answer in self._waiting:
                length = bucket_length(len(answer.prompt.tokens)) + answer.max_tokens
                # As many slots for visuals as the prompts of such a pool have.
                key = (
                    max(LEAST_SLOTS, next_power(2, length)),
                    visual_slots(len(answer.prompt.visuals)),
                )
                if key not in pools:
                    pools[key] = _Streams(self._programs, *key)
                pools[key].waiting.append(answer)
            self._waiting.clear()
            for key in [key for key, pool in pools.items() if not pool.all()]:
                del pools[key]
            if not threading.main_thread().is_alive():
                for pool in pools.values():
                    for answer in pool.all():
                        answer.cancelled = True
            self._running = bool(pools)
            return self._running


class _Streams:
    """The streams that share a pool of rows, and those that wait for one."""

    def __init__(self, programs: RowPrograms, size: int, slots: int):
        self.waiting: list[Answer] = []
        self._pool = RowPool(programs, 1, size=size, slots=slots)
        self._steps = 1

    def all(self) -> list[Answer]:
        """Returns all answers that have not ended."""
        return [answer for answer in self._pool.answers if answer is not None] + self.waiting

    def advance(self) -> list[Answer]:
        """Lets waiting answers in and decodes the next tokens; returns the answers that ended."""
        ended = [answer for answer in self.waiting if answer.cancelled]
        self.waiting = [answer for answer in self.waiting if not answer.cancelled]
        while self.waiting:
            rows = len(self._pool.answers)
            if not self._pool.free:
                if rows >= MOST_ROWS:
                    break
                self._pool.grow(4 * rows)
            answer = self.waiting[0]
            self._pool.admit([answer], 1)
            del self.waiting[0]
        before = time.perf_counter()
        ended += self._pool.advance(self._steps)
        taken = time.perf_counter() - before
        if taken < CHUNK_SECONDS / 2:
            self._steps = min(2 * self._steps, CHUNK)
        elif taken > CHUNK_SECONDS:
            self._steps = max(self._steps // 2, 1)
        return ended
