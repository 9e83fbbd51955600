"""A run ends, on every process, when its last manifest is on disk, however long that takes one."""

import os
import pathlib
import signal
import time

import pytest

from flamingo_jax.errors import EXIT_LOST, EXIT_PREEMPTED
from tests.multi_process.run_processes import last_step, saved, slow_run

pytestmark = pytest.mark.scale
STEPS = 4


@pytest.fixture(scope="module")
def config(data: pathlib.Path) -> str:
    return f"tests/end_to_end/small.py:language_model,{data}"


def finished(config: str, workdir: pathlib.Path, seconds: float, patch: pytest.MonkeyPatch) -> None:
    with slow_run(config, workdir, seconds, patch, f"--config.training.steps={STEPS}") as started:
        ended = started.finish()
    assert ended.codes == [0, 0], ended.logs
    assert saved(workdir) == [STEPS] and ended.sentences() == [[], []], ended.logs


def preempted(
    config: str, workdir: pathlib.Path, seconds: float, patch: pytest.MonkeyPatch
) -> None:
    with slow_run(config, workdir, seconds, patch, "--config.training.steps=100000") as started:
        started.wait_for(2)
        started.processes[1].send_signal(signal.SIGTERM)
        ended = started.finish()
    assert ended.codes == [EXIT_PREEMPTED] * 2, ended.logs
    assert saved(workdir) == [last_step(workdir)] and ended.sentences() == [[], []], ended.logs


@pytest.mark.parametrize("seconds", [1, 10, 30])
@pytest.mark.parametrize("end", [finished, preempted])
def test_no_last_save_is_lost(
    end: object,
    seconds: int,
    config: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twenty runs in all."""
    times = {1: 4, 10: 3, 30: 3}[seconds]
    for number in range(times):
        assert callable(end)
        end(config, tmp_path / f"run{number}", seconds, monkeypatch)
    print(f"\n{times} runs {end.__name__}, each last save {seconds} s: none lost")


def test_who_has_prepared_its_part_does_not_end_the_others(
    config: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECONDS_TO_PLAN", "20")
    with slow_run(config, tmp_path / "run", 0, monkeypatch, "--prepare") as started:
        ended = started.finish()
    assert ended.codes == [0, 0] and all("all is prepared" in log for log in ended.logs), ended.logs


def test_a_save_that_is_all_but_digested_outlives_the_death_of_another_process(
    config: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "run"
    with slow_run(config, workdir, 3, monkeypatch, f"--config.training.steps={STEPS}") as started:
        started.wait_for(STEPS)
        deadline = time.monotonic() + 60
        while not (workdir / "checkpoints" / str(STEPS) / "state").exists():
            assert time.monotonic() < deadline, started.logs()
            time.sleep(0.05)
        os.kill(started.child(1), signal.SIGKILL)
        ended = started.finish(seconds=60)
    assert ended.codes == [EXIT_LOST] * 2, ended.logs
    assert saved(workdir) == [STEPS]
