"""The pool of reader threads, which all datasets of a process share, and batches that it
makes.

A task is small, one row's text or one image, so that all threads work on the next batch due.
"""

import atexit
import collections
import functools
import itertools
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from data_pipelines.transforms.examples import Arrays

EXIT_SECONDS = 5.0
"""The most seconds to wait for reader threads when the program exits.

A thread that returns from C++ code after Python has shut down would crash the process; one
that hangs on storage must not block the exit.
"""
Job = Callable[[], None]
Queue = queue.PriorityQueue[tuple[float, int, Job | None]]


class Readers:
    """A pool of threads that works through a priority queue of tasks.

    Threads suffice: decoding and resizing images, most of the work, release Python's global
    interpreter lock.

    count: number of threads (`config.training.readers`); 0 for one per core of this process.
    """

    def __init__(self, count: int = 0):
        self.count = count or cores()
        self._queue: Queue = queue.PriorityQueue()
        self._places = itertools.count()
        for number in range(self.count):
            # Threads reference the queue, not this object: otherwise it would never be garbage
            # collected, and its threads never end.
            thread = threading.Thread(
                target=_work, args=(self._queue,), daemon=True, name=f"reader {number}"
            )
            thread.start()
            _threads.add(thread)
        _all.add(self)
        self.close = weakref.finalize(self, _end, self._queue, self.count)
        """Lets each thread end after its current task; does not wait, since one may hang on
        storage.
        """
        self.close.atexit = False

    def add(self, order: float, work: Job) -> None:
        """Queues a task. Tasks of lower `order` are done first, equal ones in order of
        addition.
        """
        self._queue.put((order, next(self._places), work))


def cores() -> int:
    """Counts the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


_all: weakref.WeakSet[Readers] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Ends all pools when the program exits, waiting at most `EXIT_SECONDS`."""
    deadline = time.monotonic() + EXIT_SECONDS
    for readers in list(_all):
        # Not `close`: weakref finalizers no longer run during exit.
        _end(readers._queue, readers.count)
    for thread in list(_threads):
        thread.join(max(deadline - time.monotonic(), 0.0))


def _work(waiting: Queue) -> None:
    """Runs tasks until a None arrives; the loop of a reader thread."""
    while True:
        _, _, work = waiting.get()
        if work is None:
            return
        work()
        # Do not keep the task, which may reference a whole batch, alive while waiting for the
        # next.
        del work


def _end(waiting: Queue, count: int) -> None:
    """Queues a None for each thread, before all other tasks."""
    for number in range(count):
        waiting.put((float("-inf"), number - count, None))


class PendingBatch:
    """A future of a batch: tasks that may add further tasks, and a last step when all are
    done.
    """

    def __init__(
        self,
        begin: Callable[["PendingBatch"], Callable[[], Arrays]],
        readers: Readers | None = None,
        order: float = 0,
    ):
        """Queues the first task.

        Args:
          begin: the first task. It adds the others and returns the function that makes the
            arrays once these are done.
          readers: None runs all tasks in the thread that calls `result`.
          order: priority among the readers' batches, lower first.
        """
        self._begin, self._readers, self._order = begin, readers, order
        self._lock = threading.Lock()
        self._left, self._ready = 0, threading.Event()
        self._here: collections.deque[Job] = collections.deque()
        self._finish: Callable[[], Arrays] | None = None
        self._made: Arrays | None = None
        self._error: BaseException | None = None
        self._cancelled = False
        self.add(self._start)

    def add(self, work: Job, soon: bool = False) -> None:
        """Adds a task that the batch waits for. After a task has failed no other is started.

        soon: do it before the batch's other tasks; without readers it has no effect.
        """
        with self._lock:
            self._left += 1
        run = functools.partial(self._run, work)
        if self._readers is None:
            self._here.append(run)
        else:
            # Orders are integers: half a step is before this batch's others, but after the
            # previous batch.
            self._readers.add(self._order - soon / 2, run)

    def result(self) -> Arrays:
        """Waits for the batch and returns it; raises what one of its tasks raised."""
        while self._here:
            self._here.popleft()()
        self._ready.wait()
        if self._error is not None:
            raise self._error
        assert self._made is not None
        return self._made

    def cancel(self) -> None:
        """Skips all tasks that have not started."""
        self._cancelled = True

    def _start(self) -> None:
        self._finish = self._begin(self)

    def _run(self, work: Job) -> None:
        """Runs a task; the last one to finish also makes the arrays."""
        self._try(work)
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._try(self._end)
            self._finish = None
            self._ready.set()

    def _end(self) -> None:
        assert self._finish is not None
        self._made = self._finish()

    def _try(self, work: Callable[[], Any]) -> None:
        if self._error is not None or self._cancelled:
            return
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised to whoever asks for the batch.
            self._error = error
