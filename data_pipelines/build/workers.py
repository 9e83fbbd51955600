"""Worker processes that convert a source's entries, in order, whatever becomes of one of them."""

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
CALLS_AHEAD = min(32, 4 * (os.cpu_count() or 1))
"""Calls whose results may wait in memory for the writer: no core shall be idle during a flush.
"""
DIED = "killed the process that read it (out of memory, or a fault in a library)"


class WorkerPool(Executor):
    """Runs processes that begin afresh (a fork would copy the threads of whoever calls).

    Where one of them dies, as when the system is out of memory, `restart` makes all of them
    anew.
    """

    def __init__(self, count: int):
        self.count = count
        self._pool = self._begun()

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        return self._pool.submit(function, *args, **options)

    def restart(self) -> None:
        """Raises UserError where new processes die before they do anything."""
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
    """A few items under way."""

    def __init__(self, items: list[A]):
        self.items = items
        self.future: Future[list[B]] = Future()


def ordered_map(
    function: Callable[[A], B],
    items: Iterable[A],
    executor: Executor | None,
    died: Callable[[A], B] | None = None,
) -> Iterator[B]:
    """Does `map` on an executor: results in order, and only so many of them in memory.

    died: the result of an item that kills the process that works on it, with a WorkerPool;
    which item that was is found by giving each of those under way to a process that has nothing
    else.
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
    """Finds who killed a process among the first calls, one for each process, and goes on."""
    pool.restart()
    for call in broken[: pool.count]:
        results: list[B] = []
        for item in call.items:
            try:
                results += pool.submit(_each, function, [item]).result()
            except BrokenExecutor:
                pool.restart()
                results.append(died(item))
            except Exception as error:  # Told to whoever asks for the call's results.
                call.future = Future()
                call.future.set_exception(error)
                break
        else:
            call.future = Future()
            call.future.set_result(results)
    for call in broken[pool.count :]:
        _submit(pool, function, call)


def _submit(executor: Executor, function: Callable[[A], B], call: _Call[A, B]) -> None:
    try:
        call.future = executor.submit(_each, function, call.items)
    except BrokenExecutor as error:
        call.future = Future()
        call.future.set_exception(error)


def _is_broken(call: _Call[Any, Any]) -> bool:
    return isinstance(call.future.exception(), BrokenExecutor)


def _each(function: Callable[[A], B], items: Iterable[A]) -> list[B]:
    return [function(item) for item in items]
