"""Converts a source's entries in worker processes, in order, and survives entries that kill a
worker.
"""

import collections
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from typing import Any, Generic, TypeVar

from flamingo_jax.errors import UserError

A = TypeVar("A")
B = TypeVar("B")

ENTRIES_PER_CALL = 8
"""Entries sent to a worker at a time."""
CALLS_AHEAD = min(32, 4 * (os.cpu_count() or 1))
"""Calls in flight, or finished and waiting for the writer, so that workers stay busy during a
flush.
"""
DIED = "killed the process that read it (out of memory, or a fault in a library)"


class WorkerPool(Executor):
    """A ProcessPoolExecutor that can be restarted after one of its processes has died.

    Processes are spawned, not forked: a fork would copy locks that other threads hold.
    """

    def __init__(self, count: int):
        self.count = count
        self._pool = self._begun()

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        return self._pool.submit(function, *args, **options)

    def restart(self) -> None:
        """Starts new processes; raises UserError where these die immediately."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = self._begun()
        try:
            self._pool.submit(os.getpid).result()
        except BrokenExecutor as error:
            raise UserError(
                "worker processes die as soon as they start: free some memory, or set --workers"
                " lower"
            ) from error

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait, cancel_futures=cancel_futures)

    def _begun(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.count, mp_context=multiprocessing.get_context("spawn"))


class _Call(Generic[A, B]):
    """A group of items that is being converted, and its future."""

    def __init__(self, items: list[A]):
        self.items = items
        self.future: Future[list[B]] = Future()


def ordered_map(
    function: Callable[[A], B],
    items: Iterable[A],
    executor: Executor | None,
    died: Callable[[A], B] | None = None,
) -> Iterator[B]:
    """Maps a function over items on an executor, lazily and in order, with bounded memory.

    Args:
      executor: None runs the function in this process.
      died: with a WorkerPool, makes the result of an item that killed its process. Which item
        that was is found by running those in flight one by one.
    """
    if executor is None:
        yield from map(function, items)
        return
    waiting: collections.deque[_Call[A, B]] = collections.deque()
    left = iter(items)
    while True:
        while len(waiting) < CALLS_AHEAD:
            if not (some := list(itertools.islice(left, ENTRIES_PER_CALL))):
                break
            waiting.append(_Call(some))
            _submit(executor, function, waiting[-1])
        if not waiting:
            return
        while _is_broken(waiting[0]):
            if died is None or not isinstance(executor, WorkerPool):
                break
            _recover(executor, function, [call for call in waiting if _is_broken(call)], died)
        yield from waiting.popleft().future.result()


def _recover(
    pool: WorkerPool,
    function: Callable[[A], B],
    broken: list[_Call[A, B]],
    died: Callable[[A], B],
) -> None:
    """Retries broken calls after a process died.

    The culprit is among the first calls, one per process, so their items run one at a time;
    the others are simply submitted again.
    """
    pool.restart()
    for call in broken[: pool.count]:
        results: list[B] = []
        for item in call.items:
            try:
                results += pool.submit(_each, function, [item]).result()
            except BrokenExecutor:
                pool.restart()
                results.append(died(item))
            except Exception as error:  # Raised when the call's result is asked for.
                call.future = Future()
                call.future.set_exception(error)
                break
        else:
            call.future = Future()
            call.future.set_result(results)
    for call in broken[pool.count :]:
        _submit(pool, function, call)


def _submit(executor: Executor, function: Callable[[A], B], call: _Call[A, B]) -> None:
    """Submits a call; a pool that is already broken counts as the call's failure."""
    try:
        call.future = executor.submit(_each, function, call.items)
    except BrokenExecutor as error:
        call.future = Future()
        call.future.set_exception(error)


def _is_broken(call: _Call[Any, Any]) -> bool:
    """Waits for a call and returns whether its process died."""
    return isinstance(call.future.exception(), BrokenExecutor)


def _each(function: Callable[[A], B], items: Iterable[A]) -> list[B]:
    return [function(item) for item in items]
