"""Builds that meet in one folder, processes that die, readers that fail: all is counted."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from data_pipelines.build.source import (
    Converted,
    DroppedRecord,
    SplitFractions,
    SplitRecord,
    record_id,
)
from data_pipelines.build.workers import DIED, WorkerPool
from data_pipelines.build.writer import write_dataset
from flamingo_jax import folder_lock
from flamingo_jax.errors import UserError
from flamingo_jax.folder_lock import PREFIX, FolderLock, FolderLockedError, lock_folder

HOLD = """
import pathlib, sys, time
from flamingo_jax.folder_lock import lock_folder
with lock_folder(pathlib.Path(sys.argv[1]), "a build"):
    print("held", flush=True)
    time.sleep(60)
"""


class Texts:
    """A source of one text an entry; some entries are faults."""

    kind, about, options, shares = (
        "text",
        "Texts.",
        {"source": "Texts"},
        SplitFractions(validation=0),
    )

    def __init__(self, *entries: str):
        self._entries = entries

    def entries(self) -> tuple[str, ...]:
        return self._entries

    def convert(self, entry: str) -> list[Converted]:
        if entry.startswith("signal"):
            os.kill(os.getpid(), int(entry.rpartition(" ")[2]))
        if entry.startswith("raise"):
            raise {"MemoryError": MemoryError, "IndexError": IndexError}[entry.rpartition(" ")[2]]
        if entry == "wrong":
            raise UserError("a mistake of the user")
        return [SplitRecord("train", {"id": entry, "text": entry}), DroppedRecord("each time")]


class Waiting(Texts):
    """Goes on when it is told."""

    def __init__(self, *entries: str):
        super().__init__(*entries)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def convert(self, entry: str) -> list[Converted]:
        self.begun.set()
        assert self.go_on.wait(30)
        return super().convert(entry)


def read(folder: pathlib.Path) -> list[str]:
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(str(folder / "1.0.0")).as_data_source(split="train")
    return [source[place]["id"].decode() for place in range(len(source))]


def test_the_second_of_two_builds_is_told_who_holds_the_folder(tmp_path: pathlib.Path) -> None:
    output, first = tmp_path / "out", Waiting("a", "b")
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(write_dataset(output, first)))
    thread.start()
    assert first.begun.wait(30)
    who = rf"out is held by a build \(process {os.getpid()} on {socket.gethostname()}\)"
    with pytest.raises(UserError, match=who):
        write_dataset(output, Texts("other"))
    first.go_on.set()
    thread.join()
    assert made[0][1] and read(output) == ["a", "b"] and not list(output.glob(f"{PREFIX}*"))
    assert write_dataset(output, Texts("a", "b"))[1] is False


def test_a_holder_that_was_killed_holds_nothing(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "out"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(output)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with (
            pytest.raises(UserError, match=f"process {other.pid} on"),
            lock_folder(output, "a run"),
        ):
            raise AssertionError
    finally:
        other.kill()
        other.wait()
    assert list(output.glob(f"{PREFIX}*"))
    write_dataset(output, Texts("a"))
    assert read(output) == ["a"] and not list(output.glob(f"{PREFIX}*"))


def test_one_at_a_time_of_many_that_come_and_go(tmp_path: pathlib.Path) -> None:
    """The file is removed by each holder while others open it."""
    inside, most, held = [0], [0], [0]

    def work() -> None:
        while held[0] < 40:
            try:
                with lock_folder(tmp_path / "deep" / "out", "a run"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(1e-4)
                    inside[0] -= 1
                    held[0] += 1
            except UserError:
                continue

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and held[0] >= 40


def test_who_comes_while_another_lets_go_keeps_its_own_lease(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, newest = FolderLock(tmp_path, "a run"), folder_lock._newest

    def after_release(folder: pathlib.Path) -> folder_lock.LeaseFile | None:
        first.release()
        monkeypatch.setattr(folder_lock, "_newest", newest)
        return newest(folder)

    monkeypatch.setattr(folder_lock, "_newest", after_release)
    second = FolderLock(tmp_path, "a build")
    with pytest.raises(FolderLockedError, match="a build"):
        FolderLock(tmp_path, "a run")
    second.release()
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_build_that_nothing_came_of(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="a mistake of the user"):
        write_dataset(tmp_path / "empty", Texts("wrong"))
    assert not list((tmp_path / "empty").glob(f"{PREFIX}*"))
    write_dataset(tmp_path / "empty", Texts("a"))
    assert read(tmp_path / "empty") == ["a"]


def test_an_entry_that_kills_its_process_is_named_and_the_others_are_used(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [f"text {number}" for number in range(60)]
    killers = {5: f"signal {int(signal.SIGKILL)}", 40: f"signal {int(signal.SIGSEGV)}"}
    for place, name in killers.items():
        entries.insert(place, name)
    with WorkerPool(2) as pool:
        statistics, _ = write_dataset(tmp_path / "out", Texts(*entries), pool)
    assert statistics["dropped"] == {"each time": 60, DIED: 2} and statistics["used"] == 60
    assert statistics["records_read"] == 122
    assert statistics["dropped_names"][DIED] == list(killers.values())
    assert read(tmp_path / "out") == [name for name in entries if name.startswith("text")]
    assert all(name in caplog.text for name in killers.values())


def test_processes_that_die_as_they_start_are_an_error_of_one_sentence(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        WorkerPool,
        "_begun",
        lambda _: ProcessPoolExecutor(1, initializer=os._exit, initargs=(1,)),
    )
    with WorkerPool(1) as pool, pytest.raises(UserError, match="die as soon as they start"):
        write_dataset(tmp_path / "out", Texts("a"), pool)


def test_a_reader_that_fails_costs_its_entry_alone(tmp_path: pathlib.Path) -> None:
    source = Texts("a", "raise MemoryError", "b", "raise IndexError", "raise IndexError")
    statistics, _ = write_dataset(tmp_path / "out", source)
    assert statistics["dropped"] == {
        "each time": 2,
        "the reader failed (IndexError)": 2,
        "the reader failed (MemoryError)": 1,
    }
    assert statistics["dropped_names"]["the reader failed (MemoryError)"] == ["raise MemoryError"]
    written = json.loads((tmp_path / "out" / "1.0.0" / "statistics.json").read_text())
    assert written["records_read"] == written["used"] + sum(written["dropped"].values()) == 7


def test_folders_of_one_name_give_ids_of_their_own(tmp_path: pathlib.Path) -> None:
    inputs = [tmp_path / "en" / "books", tmp_path / "de" / "books", tmp_path / "photos"]
    for folder in inputs:
        folder.mkdir(parents=True)
    names = tuple(map(str, inputs))
    ids = [record_id(names, folder, "1.txt") for folder in inputs]
    assert ids == ["en/books/1.txt", "de/books/1.txt", "photos/1.txt"]
    assert record_id(names[1:], inputs[1], "1.txt") == "books/1.txt"
    assert record_id(names[:1], inputs[0], "1.txt") == "1.txt"
    files = tuple(str(folder / "a.json") for folder in inputs[:2])
    for file in files:
        pathlib.Path(file).write_text("{}")
    assert {record_id(files, folder, "x") for folder in inputs[:2]} == {
        "en/books/x",
        "de/books/x",
    }
    with pytest.raises(UserError, match=r"--input names .*photos twice"):
        record_id((names[2], f"{names[2]}/../photos/"), inputs[2], "x")


def test_all_records_of_an_official_split_go_there(tmp_path: pathlib.Path) -> None:
    for split in ("train", "validation", "test"):
        shares = SplitFractions.whole(split)
        assert {shares.split(str(number)) for number in range(200)} == {split}
        assert shares.wanted() == [split]
    assert SplitFractions(0.3, 0.7).wanted() == ["validation", "test"]
