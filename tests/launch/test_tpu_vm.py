"""TPU machines: how they are made, set up, started, stopped, and a host's loop of starts."""

import fcntl
import functools
import os
import pathlib
import shlex
import signal
import subprocess

import pytest

from flamingo_jax import errors
from tests.launch.launchers import (
    AGAIN,
    FINAL,
    PREEMPTED,
    PYTHON,
    RESTARTED,
    codes,
    commit,
    executable,
    lines,
    tpu,
    until,
)


def again(folder: pathlib.Path, *values: object, **environment: str) -> int:
    codes(folder, *values)
    environment = {"PAUSE_SECONDS": "0"} | environment
    return subprocess.run(
        [AGAIN, "python", "-m", "launch.train", "a b"],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
    ).returncode


@pytest.mark.parametrize("code", RESTARTED)
def test_a_host_starts_again(stubs: pathlib.Path, code: int) -> None:
    assert again(stubs, code, code, 0) == 0
    assert [line.strip() for line in lines(stubs / "started")] == ["-m launch.train a\\ b"] * 3


@pytest.mark.parametrize("code", [0, *FINAL, 130])
def test_a_host_ends_for_good(stubs: pathlib.Path, code: int) -> None:
    assert again(stubs, 76, code) == code
    assert len(lines(stubs / "started")) == 2


def test_a_host_has_a_limit_on_starts_that_did_not_last(stubs: pathlib.Path) -> None:
    assert again(stubs, *[76] * 9, MAX_RESTARTS="2") == 76
    assert len(lines(stubs / "started")) == 3
    assert again(stubs, *[76] * 9, 0, MAX_RESTARTS="2", LASTED_SECONDS="0") == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_host_lets_the_process_save_and_starts_no_other(stubs: pathlib.Path, number: int) -> None:
    codes(stubs, "saves", 0)
    # Where the tests run in the background, they ignore SIGINT, and so would their children.
    heard = functools.partial(signal.signal, number, signal.SIG_DFL)
    loop = subprocess.Popen([AGAIN, "python"], cwd=stubs, start_new_session=True, preexec_fn=heard)
    until((stubs / "waiting").exists)
    second = subprocess.run([AGAIN, "python"], cwd=stubs, capture_output=True, text=True)
    assert (
        second.returncode == errors.EXIT_BAD_INPUT
        and "the command runs here already" in second.stderr
    )
    os.kill(int((stubs / "again.pid").read_text()), number)
    assert loop.wait(timeout=60) == PREEMPTED
    assert len(lines(stubs / "started")) == 1


def test_tpu_machines_are_made_and_deleted(stubs: pathlib.Path) -> None:
    (stubs / "states").write_text("PROVISIONING\nACTIVE\nACTIVE\nFAILED\n")
    machine = ["--accelerator-type=v4-32", "--runtime-version=tpu-ubuntu2204-base"]
    ask = ["queued-resources", "describe", "n", "--format=value(state.state)"]
    assert tpu(stubs, "create") == [
        ["queued-resources", "create", "n", *machine, "--node-id=n"],
        ask,
        ask,
    ]
    several = [*machine, "--node-count=2", "--node-prefix=n", "--spot"]
    assert tpu(stubs, "create", SLICES="2", SPOT="1") == [
        ["queued-resources", "create", "n", *several],
        ask,
    ]
    tpu(stubs, "create", expect=1)
    assert tpu(stubs, "delete") == [["queued-resources", "delete", "n", "--force", "--quiet"]]
    for wrong in ([], ["destroy"], ["start"]):
        assert tpu(stubs, *wrong, expect=2) == []


def test_tpu_machines_get_this_commit(stubs: pathlib.Path) -> None:
    nodes = [stubs / "n-0", stubs / "n-1"]
    for name in ("sudo", "python3.11"):
        executable(stubs / "bin" / name, f'#!/bin/bash\necho {name} "$@" >> made\n')
    for node in nodes:
        executable(node / "flamingo_jax/.venv/bin/pip", '#!/bin/bash\necho pip "$@" >> made\n')
    commit(stubs, "setup.py", "a/old.py", "a/b.py", "a/it's c.py")
    calls = tpu(stubs, "setup", SLICES="2", NFS="10.0.0.2:/share")
    assert [call[:2] + call[3:5] for call in calls[:2]] == [
        ["tpu-vm", "scp", f"n-{i}:flamingo_jax.tar.gz", "--worker=all"] for i in (0, 1)
    ]
    assert sorted(call[:4] for call in calls[2:]) == [
        ["tpu-vm", "ssh", f"n-{i}", "--worker=all"] for i in (0, 1)
    ]
    for node in nodes:
        assert "sudo mount -t nfs 10.0.0.2:/share /shared" in lines(node / "made")
        assert lines(node / "flamingo_jax/made") == [
            "python3.11 -m venv .venv",
            "pip install -q -e .[tpu,bucket]",
        ]
        assert (node / "flamingo_jax/a/old.py").read_text() == "a/old.py"
        # Somebody's own, and a run's.
        (node / "flamingo_jax/a/mine.py").touch()
        (node / "flamingo_jax/train.log").touch()
    commit(stubs, "setup.py", "a/b.py", "c.py")
    tpu(stubs, "setup", SLICES="2")
    for node in nodes:
        found = {
            path.relative_to(node / "flamingo_jax").as_posix()
            for path in (node / "flamingo_jax").rglob("*")
            if path.is_file()
        }
        assert found == {
            "setup.py",
            "a/b.py",
            "c.py",
            "a/mine.py",
            "train.log",
            "made",
            "again.lock",
            ".venv/bin/pip",
        }
    with open(nodes[0] / "flamingo_jax/again.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        commit(stubs, "setup.py")
        tpu(stubs, "setup", SLICES="2", expect=1)
    assert (nodes[0] / "flamingo_jax/c.py").exists()
    executable(stubs / "n-1/flamingo_jax/.venv/bin/pip", "#!/bin/bash\nexit 1\n")
    tpu(stubs, "setup", SLICES="2", expect=1)


def test_tpu_machines_start_on_every_node_and_stop_saved(stubs: pathlib.Path) -> None:
    folders = [stubs / f"n-{i}" / "flamingo_jax" for i in (0, 1)]
    for folder in folders:
        executable(folder / ".venv/bin/python", PYTHON)
        executable(folder / "launch/tpu_vm/again.sh", AGAIN.read_text())
        codes(folder, 75, "saves")
    flags = ["--config=configs/flamingo_3b.py:v4_2x2x4", "--config.name=it's here"]
    calls = tpu(stubs, "start", *flags, SLICES="2", PAUSE_SECONDS="0")
    assert sorted(call[:4] for call in calls) == [
        ["tpu-vm", "ssh", f"n-{i}", "--worker=all"] for i in (0, 1)
    ]
    for folder in folders:
        until(lambda folder=folder: len(lines(folder / "started")) == 2)
        assert [shlex.split(line) for line in lines(folder / "started")] == [
            ["-u", "-m", "launch.train", *flags]
        ] * 2
        until((folder / "waiting").exists)
    tpu(stubs, "stop", SLICES="2")
    for folder in folders:
        assert lines(folder / "started")[2:] == [] and not (folder / "again.pid").exists()
        # Left by a host that lost its power; the number is another process's by now.
        (folder / "again.pid").write_text(str(os.getpid()))
        assert "ended with exit code 75: restart 1" in (folder / "train.log").read_text()
    tpu(stubs, "stop", SLICES="2")


def test_tpu_machines_mount_a_bucket(stubs: pathlib.Path) -> None:
    node = stubs / "n"
    for name in ("sudo", "python3.11", "curl", "lsb_release"):
        executable(stubs / "bin" / name, f'#!/bin/bash\necho {name} "$@" >> made\n')
    executable(node / "flamingo_jax/.venv/bin/pip", '#!/bin/bash\necho pip "$@" >> made\n')
    commit(stubs, "setup.py")
    tpu(stubs, "setup", BUCKET="my-bucket")
    mounted = "sudo gcsfuse -o allow_other --implicit-dirs my-bucket /shared"
    assert mounted in lines(node / "made")
