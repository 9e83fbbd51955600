"""The threads that make batches: one pool for all datasets of a process, whose work is a row's
texts or one image.
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
"""The most that the end of the program waits for readers. One that comes out of a library's
code only afterwards ends the program with a signal; one that storage holds for ever never does.
"""
Job = Callable[[], None]
Queue = queue.PriorityQueue[tuple[float, int, Job | None]]


class Readers:
    """Threads that all datasets share. A thread does the work of one row or image at a time, so
    that every batch, however large, is made by all of them, and a dataset that is slow to read
    gets those that others leave idle. Decoding and resizing, which are most of the work, let
    other threads run.

    count: `config.training.readers`; 0 is one for each core that this process may use.
    """

    def __init__(self, count: int = 0):
        self.count = count or cores()
        self._queue: Queue = queue.PriorityQueue()
        self._places = itertools.count()
        for number in range(self.count):
            # What a thread holds is the queue alone, so that it ends with the readers.
            thread = threading.Thread(
                target=_work, args=(self._queue,), daemon=True, name=f"reader {number}"
            )
            thread.start()
            _threads.add(thread)
        _all.add(self)
        self.close = weakref.finalize(self, _end, self._queue, self.count)
        """Ends the threads when each has done what it is at, and waits for none: one may be
        stuck on storage.
        """
        self.close.atexit = False

    def add(self, order: float, work: Job) -> None:
        """To be done before all of a higher order, and after all of the same that was added
        before.
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
    deadline = time.monotonic() + EXIT_SECONDS
    for readers in list(_all):
        # Not by `close`: finalizers do nothing from here on.
        _end(readers._queue, readers.count)
    for thread in list(_threads):
        thread.join(max(deadline - time.monotonic(), 0.0))


def _work(waiting: Queue) -> None:
    while True:
        _, _, work = waiting.get()
        if work is None:
            return
        work()
        # Not while it waits for the next: what the work held may be a batch.
        del work


def _end(waiting: Queue, count: int) -> None:
    for number in range(count):
        waiting.put((float("-inf"), number - count, None))


class PendingBatch:
    """A batch in the making: pieces of work, which may add others, and what is made when all
    are done.
    """

    def __init__(
        self,
        begin: Callable[["PendingBatch"], Callable[[], Arrays]],
        readers: Readers | None = None,
        order: float = 0,
    ):
        """begin: the first piece of work; it returns what finishes the batch. readers: None
        leaves all work to the thread that asks for the result. order: among the readers'
        batches.
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
        """Job without which the batch is not whole. soon: readers do it before the rest of the
        batch's. After a piece that failed none is begun."""
        with self._lock:
            self._left += 1
        run = functools.partial(self._run, work)
        if self._readers is None:
            self._here.append(run)
        else:
            self._readers.add(self._order - soon / 2, run)

    def result(self) -> Arrays:
        """Waits for the batch. Raises what a piece of its work raised."""
        while self._here:
            self._here.popleft()()
        self._ready.wait()
        if self._error is not None:
            raise self._error
        assert self._made is not None
        return self._made

    def cancel(self) -> None:
        """What is not begun will not be."""
        self._cancelled = True

    def _start(self) -> None:
        self._finish = self._begin(self)

    def _run(self, work: Job) -> None:
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
