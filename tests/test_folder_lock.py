"""A folder is locked by one process, and nobody has to tidy up after one that died."""

import errno
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from flamingo_jax import folder_lock
from flamingo_jax.errors import EXIT_BAD_INPUT, EXIT_SAVE_FAILED, UserError
from flamingo_jax.folder_lock import (
    LEASE_SECONDS,
    FolderLock,
    FolderLockedError,
    LeaseState,
    lease_state,
    lock_folder,
)

ROOT = pathlib.Path(__file__).parents[1]
HOLDS = """
import pathlib, sys, time
from flamingo_jax.folder_lock import FolderLock
FolderLock(pathlib.Path(sys.argv[1]), "a run")
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("runs", "silent", "beaten", "state"),
    [
        (True, 0.0, False, LeaseState.HELD),
        # One that stands still may go on at any moment.
        (True, 10 * LEASE_SECONDS, False, LeaseState.HELD),
        (False, 0.0, False, LeaseState.FREE),
        # Its last sign of life is from before its end.
        (False, 0.0, True, LeaseState.FREE),
        (None, 0.0, False, LeaseState.UNKNOWN),
        (None, LEASE_SECONDS, False, LeaseState.UNKNOWN),
        (None, LEASE_SECONDS + 0.1, False, LeaseState.FREE),
        (None, 0.0, True, LeaseState.HELD),
        # Of hosts whose storage tells time badly the change alone counts.
        (None, 10 * LEASE_SECONDS, True, LeaseState.HELD),
        (None, -5.0, False, LeaseState.UNKNOWN),
    ],
)
def test_what_follows_from_a_lease(
    runs: bool | None, silent: float, beaten: bool, state: LeaseState
) -> None:
    assert lease_state(runs, silent, beaten) is state


def leases(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def from_elsewhere(folder: pathlib.Path, silent: float, number: int = 1) -> pathlib.Path:
    """A lease as another machine has left it."""
    folder.mkdir(exist_ok=True)
    path = folder / f".holder-{number}"
    lease = {
        "work": "a run",
        "host": "far",
        "pid": os.getpid(),
        "machine": "other",
        "began": "1",
        "folder": str(folder),
        "token": "t",
    }
    path.write_text(json.dumps(lease))
    os.utime(path, (time.time() - silent,) * 2)
    return path


def test_it_is_refused_while_held_with_host_and_process_and_free_after(
    tmp_path: pathlib.Path,
) -> None:
    with lock_folder(tmp_path / "run", "a run"):
        with pytest.raises(FolderLockedError) as caught, lock_folder(tmp_path / "run", "a run"):
            pass
        assert f"run is held by a run (process {os.getpid()} on {socket.gethostname()}): " in str(
            caught.value
        )
        assert caught.value.exit_code == EXIT_BAD_INPUT and leases(tmp_path / "run") == [
            ".holder-1"
        ]
        (tmp_path / "run" / "config.json").touch()
    assert leases(tmp_path / "run") == ["config.json"]
    with lock_folder(tmp_path / "run", "a run"), lock_folder(tmp_path / "other", "a run"):
        pass
    assert not (tmp_path / "other").exists(), "what was made for nothing is not left behind"


def test_a_killed_process_of_this_machine_is_followed_at_once(tmp_path: pathlib.Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(FolderLockedError, match=f"process {process.pid} on"):
        FolderLock(tmp_path, "a run")
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(FolderLockedError, match=f"process {process.pid} on"):
        FolderLock(tmp_path, "a run")
    process.kill()
    # Also one that nobody has waited for yet.
    deadline = time.monotonic() + 10
    while (
        pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    ):
        assert time.monotonic() < deadline
    began = time.monotonic()
    FolderLock(tmp_path, "a run").release()
    assert time.monotonic() - began < 1 and leases(tmp_path) == []
    process.wait()


def test_a_number_that_another_process_has_now_holds_nothing(tmp_path: pathlib.Path) -> None:
    mine = FolderLock(tmp_path, "a run")
    path = tmp_path / ".holder-1"
    lease = json.loads(path.read_text())
    mine.release()
    path.write_text(json.dumps(lease | {"began": "1", "token": "of an earlier one"}))
    FolderLock(tmp_path, "a run").release()


def test_a_host_that_died_is_followed_once_it_was_silent_for_long_enough(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_elsewhere(tmp_path, silent=LEASE_SECONDS + 5)
    began = time.monotonic()
    FolderLock(tmp_path, "a run").release()
    assert time.monotonic() - began < 1
    monkeypatch.setattr(folder_lock, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(folder_lock, "LOOK_EVERY", 0.05)
    from_elsewhere(tmp_path, silent=0.0)
    began = time.monotonic()
    FolderLock(tmp_path, "a run").release()
    assert 0.8 < time.monotonic() - began < 5


def test_a_host_that_lives_is_known_by_its_next_sign_of_life(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "LOOK_EVERY", 0.02)
    path = from_elsewhere(tmp_path, silent=3.0)
    sign = threading.Timer(0.3, lambda: os.utime(path))
    sign.start()
    with pytest.raises(FolderLockedError, match=f"process {os.getpid()} on far"):
        FolderLock(tmp_path, "a run")
    sign.join()
    assert leases(tmp_path) == [".holder-1"]


def test_what_is_no_lease_is_judged_by_its_age_alone(tmp_path: pathlib.Path) -> None:
    for content in (b"", b"[]", b'{"pid": "x"}', b"\xff" * 9000):
        path = from_elsewhere(tmp_path, 0.0)
        path.write_bytes(content)
        os.utime(path, (time.time() - LEASE_SECONDS - 1,) * 2)
        FolderLock(tmp_path, "a run").release()
        assert leases(tmp_path) == []


def test_a_copy_of_a_folder_is_held_by_nobody(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "LEASE_SECONDS", 0.3)
    monkeypatch.setattr(folder_lock, "LOOK_EVERY", 0.05)
    with lock_folder(tmp_path / "run", "a run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with lock_folder(tmp_path / "copy", "a run"):
            pass


def test_of_many_that_follow_a_dead_one_at_once_one_holds_it(tmp_path: pathlib.Path) -> None:
    for _ in range(20):
        from_elsewhere(tmp_path, silent=LEASE_SECONDS + 5, number=7)
        start, got = threading.Barrier(8), []

        def take(start: threading.Barrier = start, got: list[Any] = got) -> None:
            start.wait()
            try:
                got.append(FolderLock(tmp_path, "a run"))
            except FolderLockedError as error:
                got.append(error)

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = [one for one in got if isinstance(one, FolderLock)]
        assert len(got) == 8 and leases(tmp_path) == [".holder-8"]
        winner.release()
        assert leases(tmp_path) == []


def test_one_whose_folder_was_taken_while_it_stood_still_is_told(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "HEARTBEAT_EVERY", 0.02)
    told = threading.Event()
    mine = FolderLock(tmp_path, "a run", lost=lambda folder: told.set())
    path = tmp_path / ".holder-1"
    before = path.stat().st_mtime_ns
    deadline = time.monotonic() + 10
    while path.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline, "it gives signs of life"
        time.sleep(0.01)
    path.unlink()
    while not path.exists():
        assert time.monotonic() < deadline, "a lease that somebody removed is made again"
        time.sleep(0.01)
    assert not told.is_set()
    taken = from_elsewhere(tmp_path, 0.0, number=2)
    assert told.wait(10)
    mine.release()
    assert taken.exists(), "another's lease is left alone"


def test_it_ends_at_once_by_default(tmp_path: pathlib.Path) -> None:
    program = HOLDS.replace(
        "Holder(pathlib", "import flamingo_jax.holder as h; h.BEAT_EVERY = 0.05; Holder(pathlib"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    from_elsewhere(tmp_path, 0.0, number=2)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 76 and "was taken by a run (process" in err and "on far" in err


def test_what_cannot_be_written_is_told_and_what_may_pass_is_started_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to .Not a directory") as refused:
        FolderLock(tmp_path / "file" / "run", "a run")
    assert refused.value.exit_code == EXIT_BAD_INPUT

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(UserError, match="cannot be written to just now .Input/output") as passing:
        FolderLock(tmp_path, "a run")
    assert passing.value.exit_code == EXIT_SAVE_FAILED and leases(tmp_path) == ["file"]
