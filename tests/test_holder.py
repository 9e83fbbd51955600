"""A folder has one holder, and nobody has to tidy up after one that died."""

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

from flamingo_jax import holder
from flamingo_jax.errors import EXIT_BAD_INPUT, EXIT_SAVE_FAILED, UserError
from flamingo_jax.holder import SILENT, HeldError, Holder, Standing, holding, judge

ROOT = pathlib.Path(__file__).parents[1]
HOLDS = """
import pathlib, sys, time
from flamingo_jax.holder import Holder
Holder(pathlib.Path(sys.argv[1]), "a run")
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("runs", "silent", "beaten", "standing"),
    [
        (True, 0.0, False, Standing.HELD),
        # One that stands still may go on at any moment.
        (True, 10 * SILENT, False, Standing.HELD),
        (False, 0.0, False, Standing.FREE),
        # Its last sign of life is from before its end.
        (False, 0.0, True, Standing.FREE),
        (None, 0.0, False, Standing.UNKNOWN),
        (None, SILENT, False, Standing.UNKNOWN),
        (None, SILENT + 0.1, False, Standing.FREE),
        (None, 0.0, True, Standing.HELD),
        # Of hosts whose storage tells time badly the change alone counts.
        (None, 10 * SILENT, True, Standing.HELD),
        (None, -5.0, False, Standing.UNKNOWN),
    ],
)
def test_what_follows_from_a_claim(
    runs: bool | None, silent: float, beaten: bool, standing: Standing
) -> None:
    assert judge(runs, silent, beaten) is standing


def claims(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def from_elsewhere(folder: pathlib.Path, silent: float, number: int = 1) -> pathlib.Path:
    """A claim as another machine has left it."""
    folder.mkdir(exist_ok=True)
    path = folder / f".holder-{number}"
    claim = {
        "work": "a run",
        "host": "far",
        "pid": os.getpid(),
        "machine": "other",
        "began": "1",
        "folder": str(folder),
        "token": "t",
    }
    path.write_text(json.dumps(claim))
    os.utime(path, (time.time() - silent,) * 2)
    return path


def test_it_is_refused_while_held_with_host_and_process_and_free_after(
    tmp_path: pathlib.Path,
) -> None:
    with holding(tmp_path / "run", "a run"):
        with pytest.raises(HeldError) as caught, holding(tmp_path / "run", "a run"):
            pass
        assert f"run is held by a run (process {os.getpid()} on {socket.gethostname()}): " in str(
            caught.value
        )
        assert caught.value.exit_code == EXIT_BAD_INPUT and claims(tmp_path / "run") == [
            ".holder-1"
        ]
        (tmp_path / "run" / "config.json").touch()
    assert claims(tmp_path / "run") == ["config.json"]
    with holding(tmp_path / "run", "a run"), holding(tmp_path / "other", "a run"):
        pass
    assert not (tmp_path / "other").exists(), "what was made for nothing is not left behind"


def test_a_killed_process_of_this_machine_is_followed_at_once(tmp_path: pathlib.Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(HeldError, match=f"process {process.pid} on"):
        Holder(tmp_path, "a run")
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(HeldError, match=f"process {process.pid} on"):
        Holder(tmp_path, "a run")
    process.kill()
    # Also one that nobody has waited for yet.
    deadline = time.monotonic() + 10
    while (
        pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    ):
        assert time.monotonic() < deadline
    began = time.monotonic()
    Holder(tmp_path, "a run").release()
    assert time.monotonic() - began < 1 and claims(tmp_path) == []
    process.wait()


def test_a_number_that_another_process_has_now_holds_nothing(tmp_path: pathlib.Path) -> None:
    mine = Holder(tmp_path, "a run")
    path = tmp_path / ".holder-1"
    claim = json.loads(path.read_text())
    mine.release()
    path.write_text(json.dumps(claim | {"began": "1", "token": "of an earlier one"}))
    Holder(tmp_path, "a run").release()


def test_a_host_that_died_is_followed_once_it_was_silent_for_long_enough(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_elsewhere(tmp_path, silent=SILENT + 5)
    began = time.monotonic()
    Holder(tmp_path, "a run").release()
    assert time.monotonic() - began < 1
    monkeypatch.setattr(holder, "SILENT", 1.0)
    monkeypatch.setattr(holder, "LOOK_EVERY", 0.05)
    from_elsewhere(tmp_path, silent=0.0)
    began = time.monotonic()
    Holder(tmp_path, "a run").release()
    assert 0.8 < time.monotonic() - began < 5


def test_a_host_that_lives_is_known_by_its_next_sign_of_life(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder, "LOOK_EVERY", 0.02)
    path = from_elsewhere(tmp_path, silent=3.0)
    sign = threading.Timer(0.3, lambda: os.utime(path))
    sign.start()
    with pytest.raises(HeldError, match=f"process {os.getpid()} on far"):
        Holder(tmp_path, "a run")
    sign.join()
    assert claims(tmp_path) == [".holder-1"]


def test_what_is_no_claim_is_judged_by_its_age_alone(tmp_path: pathlib.Path) -> None:
    for content in (b"", b"[]", b'{"pid": "x"}', b"\xff" * 9000):
        path = from_elsewhere(tmp_path, 0.0)
        path.write_bytes(content)
        os.utime(path, (time.time() - SILENT - 1,) * 2)
        Holder(tmp_path, "a run").release()
        assert claims(tmp_path) == []


def test_a_copy_of_a_folder_is_held_by_nobody(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder, "SILENT", 0.3)
    monkeypatch.setattr(holder, "LOOK_EVERY", 0.05)
    with holding(tmp_path / "run", "a run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with holding(tmp_path / "copy", "a run"):
            pass


def test_of_many_that_follow_a_dead_one_at_once_one_holds_it(tmp_path: pathlib.Path) -> None:
    for _ in range(20):
        from_elsewhere(tmp_path, silent=SILENT + 5, number=7)
        start, got = threading.Barrier(8), []

        def take(start: threading.Barrier = start, got: list[Any] = got) -> None:
            start.wait()
            try:
                got.append(Holder(tmp_path, "a run"))
            except HeldError as error:
                got.append(error)

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = [one for one in got if isinstance(one, Holder)]
        assert len(got) == 8 and claims(tmp_path) == [".holder-8"]
        winner.release()
        assert claims(tmp_path) == []


def test_one_whose_folder_was_taken_while_it_stood_still_is_told(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder, "BEAT_EVERY", 0.02)
    told = threading.Event()
    mine = Holder(tmp_path, "a run", lost=lambda folder: told.set())
    path = tmp_path / ".holder-1"
    before = path.stat().st_mtime_ns
    deadline = time.monotonic() + 10
    while path.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline, "it gives signs of life"
        time.sleep(0.01)
    path.unlink()
    while not path.exists():
        assert time.monotonic() < deadline, "a claim that somebody removed is made again"
        time.sleep(0.01)
    assert not told.is_set()
    taken = from_elsewhere(tmp_path, 0.0, number=2)
    assert told.wait(10)
    mine.release()
    assert taken.exists(), "another's claim is left alone"


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
        Holder(tmp_path / "file" / "run", "a run")
    assert refused.value.exit_code == EXIT_BAD_INPUT

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(UserError, match="cannot be written to just now .Input/output") as passing:
        Holder(tmp_path, "a run")
    assert passing.value.exit_code == EXIT_SAVE_FAILED and claims(tmp_path) == ["file"]
