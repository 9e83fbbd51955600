"""Two real processes: what `make test` can afford of what the other files here prove."""

import os
import pathlib
import signal
import time

import numpy as np
import pytest

from flamingo_jax.distributed.supervisor import GRACE_SECONDS
from flamingo_jax.errors import EXIT_BAD_INPUT, EXIT_LOST, EXIT_PREEMPTED
from flamingo_jax.json_lines import read_lines
from tests.multi_process.run_processes import RunProcesses, last_step, losses, run, saved, slow_run

QUICK = ("--config.training.save_every=2",)


def test_two_processes_stop_at_one_step_and_one_process_goes_on_with_the_same_losses(
    data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last save takes longer than a process may be silent and its supervisor then waits for
    its end.
    """
    config = f"tests/end_to_end/small.py:language_model,{data}"
    endless = "--config.training.steps=100000"
    with slow_run(config, tmp_path / "run", 3 + GRACE_SECONDS + 2, monkeypatch, endless) as started:
        started.wait_for(3)
        started.processes[1].send_signal(signal.SIGTERM)
        ended = started.finish()
    assert ended.codes == [EXIT_PREEMPTED] * 2, ended.logs
    stopped = last_step(tmp_path / "run")
    assert saved(tmp_path / "run") == [stopped]
    assert all(f"stopped by a signal at step {stopped} and saved" in log for log in ended.logs)
    assert not list((tmp_path / "run").glob(".preflight*"))

    steps = f"--config.training.steps={stopped + 2}"
    run(1, config, tmp_path / "run", steps, *QUICK, devices=4)
    run(1, config, tmp_path / "whole", steps, *QUICK, devices=4)
    ours, whole = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert list(ours) == list(whole) == list(range(1, stopped + 3))
    np.testing.assert_allclose(list(ours.values()), list(whole.values()), rtol=1e-5)
    goodput = read_lines(tmp_path / "run" / "goodput.jsonl")
    assert [line["resume"] for line in goodput if "resume" in line] == [0, stopped]


def test_a_killed_process_ends_the_other_with_its_name(
    data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = f"tests/end_to_end/small.py:language_model,{data}"
    with RunProcesses(
        2, config, tmp_path / "run", "--config.training.steps=100000", *QUICK
    ) as started:
        started.wait_for(5)
        with RunProcesses(1, config, tmp_path / "run", logs=tmp_path.parent) as second:
            refused = second.finish()
        assert refused.codes == [EXIT_BAD_INPUT]
        assert f"is held by a run (process {started.processes[0].pid} on " in refused.logs[0]
        os.kill(started.child(0), signal.SIGKILL)
        began = time.monotonic()
        ended = started.finish(seconds=30)
    assert time.monotonic() - began < 20
    assert ended.codes == [EXIT_LOST] * 2
    for told in ended.sentences():
        assert len(told) == 1 and "process 0" in told[0] and "SIGKILL" in told[0]
    assert saved(tmp_path / "run")


def test_another_config_is_refused_before_anything_is_written(
    data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = f"tests/end_to_end/small.py:language_model,{data}"
    with RunProcesses(
        2, config, tmp_path / "run", extra=[(), ("--config.optimizer.learning_rate=0.5",)]
    ) as started:
        ended = started.finish()
    assert ended.codes == [EXIT_BAD_INPUT] * 2
    for told in ended.sentences():
        assert (
            len(told) == 1
            and "config.optimizer.learning_rate = 0.5" in told[0]
            and "process 1" in told[0]
        )
    assert not (tmp_path / "run").exists()


def test_a_process_that_does_not_come_is_named(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = f"tests/end_to_end/small.py:language_model,{data}"
    with RunProcesses(2, config, tmp_path / "run", "--start_timeout=12") as started:
        started.processes[1].kill()
        ended = started.finish()
    assert ended.codes[0] == 69
    ((told,),) = ended.sentences()[:1]
    assert "process 1 of 2" in told
    assert "waiting for process 1 of 2" in ended.logs[0]
