"""SLURM's job script: what it asks for, when it starts again, how it ends."""

import os
import pathlib
import signal
import subprocess

import pytest

from tests.launch.launchers import (
    AGAIN,
    FINAL,
    PREEMPTED,
    RESTARTED,
    SLURM,
    TPU,
    codes,
    lines,
    until,
)


@pytest.mark.parametrize("script", [SLURM, AGAIN, TPU], ids=lambda path: path.name)
def test_the_scripts_are_bash(script: pathlib.Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def slurm_environment(restarts: int, **more: str) -> dict[str, str]:
    return (
        os.environ
        | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "SLURM_GPUS_ON_NODE": "4"}
        | more
    )


def slurm(folder: pathlib.Path, *values: object, **environment: str) -> int:
    """Runs the job, again for as long as it queues itself again, and returns its last exit
    code.
    """
    codes(folder, *values)
    restarts = 0
    while True:
        done = subprocess.run(
            [SLURM, "--config=a b"],
            cwd=folder,
            env=slurm_environment(restarts, **environment),
            capture_output=True,
        )
        queued = lines(folder / "scontrol")
        assert queued == ["requeue 7"] * len(queued)
        if len(queued) == restarts:
            return done.returncode
        assert done.returncode == 0
        restarts = len(queued)


@pytest.mark.parametrize("code", RESTARTED)
def test_slurm_starts_again(stubs: pathlib.Path, code: int) -> None:
    assert slurm(stubs, code, code, 0) == 0
    assert lines(stubs / "started") == ["0,1,2,3 -u -m launch.train --config=a\\ b "] * 3
    assert lines(stubs / "srun") == ["--kill-on-bad-exit=0", "--wait=0"] * 3


def test_slurm_gives_the_tasks_the_cores_of_the_job(stubs: pathlib.Path) -> None:
    """Since 22.05 srun does not take them from the job's own --cpus-per-task."""
    assert slurm(stubs, 0, SLURM_CPUS_PER_TASK="64") == 0
    assert lines(stubs / "srun")[2] == "--cpus-per-task=64"


@pytest.mark.parametrize("code", [0, *FINAL, 130])
def test_slurm_ends_for_good(stubs: pathlib.Path, code: int) -> None:
    assert slurm(stubs, code) == code
    assert len(lines(stubs / "started")) == 1


def test_slurm_hears_the_one_process_that_knows_better(stubs: pathlib.Path) -> None:
    assert slurm(stubs, 76, 3, 137, TASKS="3") == 3
    assert lines(stubs / "scontrol") == []


def test_slurm_starts_again_where_one_process_of_several_was_lost(stubs: pathlib.Path) -> None:
    assert slurm(stubs, 76, 137, 76, 0, 0, 0, TASKS="3") == 0
    assert lines(stubs / "scontrol") == ["requeue 7"]


def test_slurm_has_a_limit(stubs: pathlib.Path) -> None:
    assert slurm(stubs, *[PREEMPTED] * 9, MAX_RESTARTS="2") == PREEMPTED
    assert len(lines(stubs / "started")) == 3


def test_slurm_lets_a_process_save_on_sigterm(stubs: pathlib.Path) -> None:
    codes(stubs, "saves")
    job = subprocess.Popen(
        [SLURM],
        cwd=stubs,
        env=slurm_environment(0),
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    until((stubs / "waiting").exists)
    # As SLURM signals all that is in a job.
    os.killpg(job.pid, signal.SIGTERM)
    _, told = job.communicate(timeout=60)
    assert job.returncode == 0 and b"ended with exit code 75: queued again" in told
    assert lines(stubs / "scontrol") == ["requeue 7"]


def test_what_slurm_is_asked_for() -> None:
    asked = [line.removeprefix("#SBATCH --") for line in lines(SLURM) if line.startswith("#SBATCH")]
    assert {"requeue", "ntasks-per-node=1", "open-mode=append"} <= set(asked)
    (sent,) = (option for option in asked if option.startswith("signal="))
    # Without "B:", which would send it to the batch shell alone.
    name, _, seconds = sent.removeprefix("signal=").partition("@")
    assert name == "TERM" and int(seconds) >= 120
