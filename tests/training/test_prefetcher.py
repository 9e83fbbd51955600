"""Reading that is stuck on storage keeps no end waiting."""

import logging
import threading
import time
from typing import Any

import jax
import numpy as np
import pytest

from data_pipelines.batches import BatchIterator
from data_pipelines.readers import PendingBatch, Readers
from flamingo_jax.experiment import MeshConfig
from flamingo_jax.partitioning.host_shard import WHOLE_BATCH
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.training import prefetcher


class Stuck:
    """Reads one batch, and waits for storage from the next on. A source of rows as well as an
    iterator."""

    def __init__(self) -> None:
        self.asked, self.answer, self.given = threading.Event(), threading.Event(), 0

    def __next__(self) -> dict[str, np.ndarray]:
        self.given += 1
        if self.given > 1:
            self.asked.set()
            self.answer.wait()
        tokens = np.ones((jax.device_count(), 4), np.int32)
        return {
            "tokens": tokens,
            "positions": tokens,
            "segments": tokens,
            "loss_mask": tokens > 0,
        }

    def batch(
        self, first: int, size: int, share: Any, readers: Readers | None, order: float
    ) -> PendingBatch:
        return PendingBatch(lambda batch: lambda: next(self), readers, order)

    def get_state(self) -> int:
        return self.given

    def set_state(self, state: int) -> None:
        self.given = state


def test_a_prefetcher_is_closed_though_its_reader_is_stuck(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(prefetcher, "CLOSE_SECONDS", 0.3)
    stuck = Stuck()
    made = prefetcher.Prefetcher({"text": stuck}, make_mesh(MeshConfig(data=-1)))
    assert next(made).positions == {"text": 1}
    stuck.asked.wait(10)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        made.close()
    assert time.monotonic() - began < 5
    assert "did not stop" in caplog.text and made._thread.is_alive()
    stuck.answer.set()
    made._thread.join(10)
    assert not made._thread.is_alive(), "it ends by itself once the storage answers"


def test_a_signal_ends_a_wait_for_storage() -> None:
    stuck, asked = Stuck(), threading.Event()
    made = prefetcher.Prefetcher(
        {"text": stuck}, make_mesh(MeshConfig(data=-1)), until=asked.is_set
    )
    stuck.asked.wait(30)
    asked.set()
    assert next(made).positions == {"text": 1}, "what is there is given"
    began = time.monotonic()
    assert next(made, None) is None and time.monotonic() - began < 5
    stuck.answer.set()
    made.close()


def test_an_iterator_of_batches_is_closed_though_its_threads_are_stuck() -> None:
    stuck = Stuck()
    readers = Readers(1)
    batches = BatchIterator(stuck, 4, WHOLE_BATCH, readers)  # type: ignore[arg-type]
    next(batches)
    stuck.asked.wait(10)
    began = time.monotonic()
    batches.close()
    readers.close()
    assert time.monotonic() - began < 1
    stuck.answer.set()
