"""Runs that are killed, damaged and signalled through the real command give every step's loss
to the bit.
"""

import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from flamingo_jax.checkpointing import manifest
from flamingo_jax.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED
from flamingo_jax.json_lines import read_lines
from tests.processes import one_device

ROOT = pathlib.Path(__file__).parents[2]
STEPS, KILLS = 30, 10
SECONDS = 300.0
"""The most that a run may take to reach a step."""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def start(data: pathlib.Path) -> Start:
    """(workdir, *overrides, stage) -> the training command, running on one device."""

    def run(
        workdir: pathlib.Path, *overrides: str, stage: str = "flamingo"
    ) -> "subprocess.Popen[str]":
        return launch(
            "train",
            f"--config=tests/end_to_end/small.py:{stage},{data}",
            f"--workdir={workdir}",
            *overrides,
        )

    return run


def launch(command: str, *arguments: str) -> "subprocess.Popen[str]":
    """A command of launch/, running on one device."""
    return subprocess.Popen(
        [sys.executable, "-m", f"launch.{command}", *arguments],
        cwd=ROOT,
        env=one_device(),
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    """Waits for a command that should exit with `code`; returns what it wrote to stderr."""
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == code, err
    return err


def losses(workdir: pathlib.Path) -> dict[int, float]:
    found: dict[int, float] = {}
    for line in read_lines(workdir / "metrics.jsonl"):
        assert line["step"] not in found, f"step {line['step']} is there twice"
        found[line["step"]] = line["loss"]
    return found


def last_step(workdir: pathlib.Path) -> int:
    return max((line["step"] for line in read_lines(workdir / "metrics.jsonl")), default=0)


def wait_for(step: int, workdir: pathlib.Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + SECONDS
    while last_step(workdir) < step and process.poll() is None:
        assert time.monotonic() < deadline, f"{workdir} never came to step {step}"
        time.sleep(0.002)


def newest(workdir: pathlib.Path) -> int:
    return max(
        (
            int(path.parent.name)
            for path in workdir.glob(f"checkpoints/*/{manifest.NAME}")
            if path.parent.name.isdecimal()
        ),
        default=0,
    )


@pytest.fixture(scope="module")
def unbroken(start: Start, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("unbroken")
    finish(start(workdir))
    found = losses(workdir)
    assert list(found) == list(range(1, STEPS + 1)) and len(set(found.values())) == STEPS
    return found


@pytest.mark.scale
def test_killed_ten_times_the_losses_are_the_unbroken_runs(
    start: Start, unbroken: dict[int, float], tmp_path: pathlib.Path
) -> None:
    chance = random.Random(0)
    for kill in range(KILLS):
        before = newest(tmp_path)
        process = start(tmp_path)
        # The records of what comes after the checkpoint are cut away at the start of the run;
        # until then they are the last run's.
        ahead = chance.randint(1, 4)
        while last_step(tmp_path) > before and process.poll() is None:
            time.sleep(0.002)
        wait_for(min(before + ahead, STEPS - 2), tmp_path, process)
        time.sleep(chance.random() * 0.05)
        assert process.poll() is None, f"the run ended before kill {kill}: {finish(process)}"
        os.kill(process.pid, signal.SIGKILL)
        finish(process, -signal.SIGKILL)
        assert last_step(tmp_path) < STEPS
    finish(start(tmp_path))
    assert losses(tmp_path) == unbroken


@pytest.mark.scale
def test_a_flipped_byte_is_named_and_the_checkpoint_before_is_used(
    start: Start, unbroken: dict[int, float], tmp_path: pathlib.Path
) -> None:
    process = start(tmp_path)
    wait_for(11, tmp_path, process)
    process.terminate()
    finish(process, EXIT_PREEMPTED)
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert len(steps) == 2 and steps[-1] >= 11
    folder = tmp_path / "checkpoints" / str(steps[-1])
    victim = max(
        (file for file in folder.rglob("*") if file.is_file()),
        key=lambda file: file.stat().st_size,
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)

    err = finish(start(tmp_path))
    (warning,) = [line for line in err.splitlines() if "damaged" in line]
    assert f"{folder}.damaged" in warning and victim.name in warning
    assert (tmp_path / "checkpoints" / f"{steps[-1]}.damaged").is_dir()
    assert losses(tmp_path) == unbroken


def test_a_signal_saves_exits_with_its_code_and_the_same_command_goes_on(
    start: Start, tmp_path: pathlib.Path
) -> None:
    # The stage that compiles soonest.
    stage = "language_model"
    process = start(
        tmp_path / "stopped",
        "--config.training.steps=100000",
        "--config.training.save_every=100000",
        stage=stage,
    )
    wait_for(1, tmp_path / "stopped", process)
    # One that stands still holds its workdir too, and comes no further meanwhile.
    process.send_signal(signal.SIGSTOP)
    before = (tmp_path / "stopped" / "config.json").read_bytes()
    err = finish(start(tmp_path / "stopped", "--config.seed=7", stage=stage), EXIT_BAD_INPUT)
    who = f"a run (process {process.pid} on {socket.gethostname()})"
    assert f"{tmp_path / 'stopped'} is held by {who}" in err
    assert (tmp_path / "stopped" / "config.json").read_bytes() == before
    process.send_signal(signal.SIGCONT)
    process.terminate()
    err = finish(process, EXIT_PREEMPTED)
    stopped = last_step(tmp_path / "stopped")
    assert f"stopped by a signal at step {stopped} and saved" in err
    for workdir in ("stopped", "unbroken"):
        finish(
            start(
                tmp_path / workdir,
                f"--config.training.steps={stopped + 2}",
                "--config.training.save_every=100000",
                stage=stage,
            )
        )
    assert losses(tmp_path / "stopped") == losses(tmp_path / "unbroken")
    assert not list((tmp_path / "stopped").glob(".holder*"))
