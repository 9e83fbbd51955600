"""Prefetches batches to the devices: a thread reads ahead, and every batch comes with the data
position to resume from after it.
"""

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from flamingo_jax.partitioning.host_shard import HostShard
from flamingo_jax.partitioning.mesh import batch_shardings

log = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0
"""How long `close` waits for the reading thread, which may be stuck on storage that does not
answer.
"""

HostBatch = dict[str, np.ndarray]


class DataIterator(Protocol):
    """An endless iterator over this process's `HostShard` of a dataset's batches, with a
    position that can be saved as JSON and restored.
    """

    def __next__(self) -> HostBatch: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


class StepInput(NamedTuple):
    """The input of a training step: a batch of each dataset, as global arrays."""

    batches: dict[str, dict[str, jax.Array]]
    positions: dict[str, Any]
    """Each dataset's position after these batches, to be saved with the state that has seen
    them. The iterators themselves are ahead.
    """


def shard_batch(batch: HostBatch, mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays, sharded over the mesh, from this process's `HostShard` of a batch."""
    shardings, parts = batch_shardings(batch, mesh), HostShard.of(mesh).parts(batch)
    return {
        name: jax.make_array_from_callback(
            parts[name].shape(array), shardings[name], functools.partial(parts[name].cut, array)
        )
        for name, array in batch.items()
    }


class Prefetcher:
    """Iterates over step inputs, reading `depth` of them ahead in a thread.

    Errors in the thread are raised by `next`. `seconds_waiting` is how long `next` has waited
    for data so far.

    Args:
      iterators: each dataset's batches.
      until: polled while `next` waits; when it returns True the iteration ends, so that a run
        can be stopped although its storage hangs.
    """

    def __init__(
        self,
        iterators: Mapping[str, DataIterator],
        mesh: Mesh,
        *,
        depth: int = 2,
        until: Callable[[], bool] = lambda: False,
    ):
        self._iterators, self._mesh, self._until = dict(iterators), mesh, until
        self._queue: queue.Queue[StepInput | BaseException] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True, name="prefetcher")
        self.seconds_waiting = 0.0
        self._thread.start()

    def _read(self) -> None:
        """Runs in the thread: reads batches, moves them to the devices, queues them."""
        try:
            while not self._stop.is_set():
                host = {name: next(iterator) for name, iterator in self._iterators.items()}
                positions = {
                    name: iterator.get_state() for name, iterator in self._iterators.items()
                }
                batches = {name: shard_batch(batch, self._mesh) for name, batch in host.items()}
                self._offer(StepInput(batches, positions))
        except BaseException as error:  # noqa: BLE001 - handed to the loop, which raises it
            self._offer(error)

    def _offer(self, item: StepInput | BaseException) -> None:
        """Puts an item into the queue once there is room; gives up when closed."""
        # A put without a timeout would block for ever after the loop has ended.
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[StepInput]:
        return self

    def __next__(self) -> StepInput:
        """Waits for the next input; raises an error of the reading thread, or StopIteration
        where `until` says so.
        """
        began = time.monotonic()
        while True:
            try:
                item = self._queue.get(timeout=0.5)
                break
            except queue.Empty:
                if self._until():
                    raise StopIteration from None
        self.seconds_waiting += time.monotonic() - began
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stops reading. A thread that is stuck in a read is left behind."""
        self._stop.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            why = "its storage does not answer"
            log.warning(
                "the reader did not stop within %.0f s and is left behind: %s",
                CLOSE_SECONDS,
                why,
            )
