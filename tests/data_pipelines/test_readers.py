"""The readers' pool: whose turn it is, what a failure does, and how much a batch holds
meanwhile.
"""

import gc
import pathlib
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from data_pipelines.readers import PendingBatch, Readers, cores
from data_pipelines.transforms.examples import Arrays
from flamingo_jax.errors import UserError
from flamingo_jax.processing import images
from flamingo_jax.processing.tokenizer import Tokenizer
from tests.data_pipelines.toy_data import (
    iterator,
    take,
)


def nothing() -> Arrays:
    return {}


def test_a_batch_is_made_by_all_readers_and_ends_with_its_last_work() -> None:
    readers, here = Readers(4), threading.Barrier(4)
    found: list[str] = []

    def piece(batch: PendingBatch, depth: int) -> None:
        # Nobody passes unless four work at once.
        here.wait(10)
        if depth:
            batch.add(lambda: piece(batch, depth - 1))
        found.append(threading.current_thread().name)

    def begin(batch: PendingBatch) -> Callable[[], Arrays]:
        for _ in range(4):
            batch.add(lambda: piece(batch, 2))
        return lambda: {"count": np.array(len(found))}

    assert int(PendingBatch(begin, readers).result()["count"]) == 12
    assert len(set(found)) == 4


def test_earlier_batches_of_all_datasets_come_first() -> None:
    readers, begun, block = Readers(1), [], threading.Event()
    readers.add(-1, lambda: bool(block.wait(10)) and None)
    batches = []
    for dataset in "ab":
        for number in range(3):

            def begin(
                batch: PendingBatch, name: str = f"{dataset}{number}"
            ) -> Callable[[], Arrays]:
                for part in range(2):
                    batch.add(lambda part=part: begun.append(f"{name}.{part}"))  # type: ignore[misc]
                return nothing

            batches.append(PendingBatch(begin, readers, number))
    block.set()
    for batch in batches:
        batch.result()
    assert [name[1] for name in begun] == sorted(name[1] for name in begun)
    assert begun[:4] == ["a0.0", "a0.1", "b0.0", "b0.1"]


@pytest.mark.parametrize("readers", [None, Readers(2)])
def test_what_fails_is_raised_to_who_asks_and_the_rest_is_left(readers: Readers | None) -> None:
    done: list[int] = []

    def work(number: int) -> None:
        if number == 1:
            raise UserError("the second piece")
        time.sleep(0.002)
        done.append(number)

    def begin(batch: PendingBatch) -> Callable[[], Arrays]:
        for number in range(500):
            batch.add(lambda number=number: work(number))  # type: ignore[misc]
        return nothing

    with pytest.raises(UserError, match="the second piece"):
        PendingBatch(begin, readers).result()
    assert len(done) < 5
    assert PendingBatch(lambda batch: nothing, readers).result() == {}, "the readers go on"


def test_readers_end_with_whoever_holds_them() -> None:
    before = threading.active_count()
    readers = Readers(3)
    assert threading.active_count() == before + 3
    del readers
    gc.collect()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_their_number_is_the_configs_or_the_cores() -> None:
    assert Readers().count == cores() >= 1 and Readers(5).count == 5


@pytest.mark.parametrize(
    "task, kind", [("flamingo", "pairs"), ("flamingo", "videos"), ("contrastive", "pairs")]
)
@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_holds_each_image_once(
    task: str,
    kind: str,
    count: int,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of what was decoded nothing is alive but in the batches, and the image that each reader
    is at.
    """
    decode, alive, most = images.decode, 0, 0
    lock = threading.Lock()

    def gone() -> None:
        nonlocal alive
        with lock:
            alive -= 1

    def counted(data: bytes, size: int, **options: Any) -> np.ndarray:
        nonlocal alive, most
        pixels = decode(data, size, **options).copy()
        with lock:
            alive += 1
            most = max(most, alive)
        weakref.finalize(pixels, gone)
        return pixels

    monkeypatch.setattr(images, "decode", counted)
    batches = take(
        iterator(task, kind, tokenizer, readers=Readers(count), cache_bytes=0, flip=True), 4
    )
    shown = sum(int(batch["images"].any((-3, -2, -1)).sum()) for batch in batches)
    assert shown > 4 * count and 1 <= most <= count
    gc.collect()
    assert alive == 0


def test_what_is_read_ahead_is_bounded(
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decode, met = images.decode, []
    monkeypatch.setattr(
        images,
        "decode",
        lambda data, size, **options: met.append(data) or decode(data, size, **options),
    )
    it = iterator("contrastive", "pairs", tokenizer, readers=Readers(2), cache_bytes=0)
    rows = len(next(it)["images"])
    deadline = time.monotonic() + 5
    while len(met) < 3 * rows and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(met) == 3 * rows
    it.close()


LEAVING = """
import sys, time
from array_record.python import array_record_module as array_record
from data_pipelines.readers import Readers

writer = array_record.ArrayRecordWriter(sys.argv[1], "group_size:1")
for _ in range(16):
    writer.write(bytes(200_000))
writer.close()
file = array_record.ArrayRecordReader(sys.argv[1], "readahead_buffer_size:0")
readers = Readers(4)


def work():
    file.read([0, 5, 9])
    readers.add(0, work)


for _ in range(8):
    readers.add(0, work)
time.sleep(0.2)
"""


def test_a_program_ends_by_its_own_code_while_readers_are_at_work(
    tmp_path: pathlib.Path,
) -> None:
    """A thread that comes out of a C++ library into an interpreter that is gone would end it
    with SIGABRT.
    """
    ended = subprocess.run(
        [sys.executable, "-c", LEAVING, str(tmp_path / "a")],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
