"""Processes that are stopped and killed, ten times each: all end as documented, nothing that
was saved is lost, the next start goes on.
"""

import contextlib
import os
import pathlib
import random
import signal
import time

import numpy as np
import pytest

from flamingo_jax.checkpointing import manifest
from flamingo_jax.errors import EXIT_LOST, EXIT_PREEMPTED
from tests.multi_process.run_processes import RunProcesses, last_step, losses, run, saved

TIMES = 10
SET_TIME = 20.0
"""Seconds in which all must have ended after one was killed outright."""
ENDLESS = ("--config.training.steps=100000", "--config.training.save_every=5")


@pytest.fixture(scope="module")
def config(data: pathlib.Path) -> str:
    return f"tests/end_to_end/small.py:language_model,{data}"


def begun(workdir: pathlib.Path) -> set[tuple[str, int]]:
    """Saves whose folder is there and whose manifest is not, known by their inodes: what an
    earlier start left is removed by the next save.
    """
    found = set()
    for path in workdir.glob("checkpoints/*"):
        # The run may remove it at any moment.
        with contextlib.suppress(FileNotFoundError):
            if path.name.isdecimal() and not (path / manifest.NAME).exists():
                found.add((path.name, path.stat().st_ino))
    return found


def require_whole(workdir: pathlib.Path) -> None:
    """Every step that counts as saved is as it was written."""
    for step in saved(workdir):
        folder = workdir / "checkpoints" / str(step)
        manifest.check_digests(folder, manifest.read_manifest(folder))


def require_same_losses(config: str, workdir: pathlib.Path) -> None:
    """The broken run gone on with for two steps, and an unbroken one of as many."""
    steps = f"--config.training.steps={saved(workdir)[-1] + 2}"
    run(2, config, workdir, steps, ENDLESS[1])
    run(2, config, workdir.with_name("unbroken"), steps, ENDLESS[1])
    broken, unbroken = losses(workdir), losses(workdir.with_name("unbroken"))
    assert list(broken) == list(unbroken)
    np.testing.assert_allclose(list(broken.values()), list(unbroken.values()), rtol=1e-5)


@pytest.mark.scale
def test_sigterm_stops_all_at_one_step(config: str, tmp_path: pathlib.Path) -> None:
    chance, workdir, before = random.Random(0), tmp_path / "run", 0
    for _ in range(TIMES):
        with RunProcesses(2, config, workdir, *ENDLESS) as started:
            started.wait_for(before + chance.randint(1, 4))
            time.sleep(chance.random())
            started.processes[chance.randrange(2)].send_signal(signal.SIGTERM)
            ended = started.finish()
        assert ended.codes == [EXIT_PREEMPTED] * 2, ended.logs
        stopped = last_step(workdir)
        assert stopped > before and saved(workdir)[-1] == stopped
        assert all(f"stopped by a signal at step {stopped} and saved" in log for log in ended.logs)
        before = stopped
    require_same_losses(config, workdir)


@pytest.mark.scale
@pytest.mark.parametrize("whole_host", [True, False], ids=["the host", "the training process"])
def test_sigkill_ends_the_others_in_time(
    whole_host: bool, config: str, tmp_path: pathlib.Path
) -> None:
    """Of the ten, five are a supervisor with what it started, as where a host dies, and five
    its child alone, as where memory is short.
    """
    chance, workdir, slowest = random.Random(whole_host), tmp_path / "run", 0.0
    for _ in range(TIMES // 2):
        before = max(saved(workdir), default=0)
        with RunProcesses(2, config, workdir, *ENDLESS) as started:
            while last_step(workdir) > before:
                # Lines behind the checkpoint are cut away when the run starts.
                time.sleep(0.01)
            started.wait_for(before + chance.randint(6, 9))
            victim = chance.randrange(2)
            child = started.child(victim)
            began = time.monotonic()
            if whole_host:
                os.kill(started.processes[victim].pid, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            ended = started.finish(seconds=60)
            slowest = max(slowest, time.monotonic() - began)
        assert ended.codes[1 - victim] == EXIT_LOST, ended.logs
        assert ended.codes[victim] == (-signal.SIGKILL if whole_host else EXIT_LOST)
        (told,) = ended.sentences()[1 - victim]
        assert f"process {victim}" in told
        require_whole(workdir)
        assert max(saved(workdir), default=0) >= before
    assert len(saved(workdir)) > 1
    print(f"\nall had ended {slowest:.1f} s after the kill at most")
    assert slowest < SET_TIME
    require_same_losses(config, workdir)


@pytest.mark.scale
def test_sigkill_during_a_save_leaves_it_whole_or_absent(
    config: str, tmp_path: pathlib.Path
) -> None:
    chance, workdir, unfinished = random.Random(2), tmp_path / "run", 0
    for _ in range(TIMES):
        left = begun(workdir)
        with RunProcesses(2, config, workdir, *ENDLESS) as started:
            victim = chance.randrange(2)
            deadline = time.monotonic() + 300
            while not begun(workdir) - left:
                assert time.monotonic() < deadline and all(
                    process.poll() is None for process in started.processes
                ), started.logs()
            time.sleep(chance.random() * 0.3)
            child = started.child(victim)
            os.kill(started.processes[victim].pid, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            ended = started.finish(seconds=60)
        assert ended.codes[1 - victim] == EXIT_LOST, ended.logs
        unfinished += bool(begun(workdir))
        require_whole(workdir)
    print(f"\n{unfinished} of {TIMES} kills left a save unfinished")
    assert unfinished
    # Where no save was ever finished the run begins again.
    (
        run(2, config, workdir, "--config.training.steps=12", ENDLESS[1])
        if not saved(workdir)
        else require_same_losses(config, workdir)
    )
