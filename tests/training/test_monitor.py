"""What a run writes and when, through stand-ins for the run and its processes."""

import contextlib
import json
import pathlib
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from flamingo_jax.experiment import MeshConfig
from flamingo_jax.json_lines import read_lines
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.tasks.flops import Work
from flamingo_jax.training.goodput import read_goodput
from flamingo_jax.training.monitor import Monitor
from flamingo_jax.training.run import RunClock
from tests.training import world


class Processes:
    """Notes the heartbeats of a process, with what its metrics file holds just then."""

    def __init__(self, workdir: pathlib.Path):
        self.beats: list[tuple[int, str, list[int]]] = []
        self._file = workdir / "metrics.jsonl"

    def heartbeat(self, step: int, phase: str, waited: float) -> None:
        self.beats.append((step, phase, [line["step"] for line in read_lines(self._file)]))


@contextlib.contextmanager
def watching(workdir: pathlib.Path, start: int = 0) -> Iterator[tuple[Monitor, Processes]]:
    processes = Processes(workdir)
    run: Any = types.SimpleNamespace(
        workdir=workdir, start=start, clock=RunClock(), mesh=make_mesh(MeshConfig(data=-1))
    )
    prefetcher: Any = types.SimpleNamespace(seconds_waiting=0.0)
    experiment = world.experiment(trackers=())
    with Monitor(experiment, run, prefetcher, processes) as monitor:  # type: ignore[arg-type]
        yield monitor, processes


def metrics(step: int) -> dict[str, Any]:
    """Those of a step of four rows of five tokens, three in four of them real."""
    return {
        "loss": np.float32(step),
        "skipped_in_a_row": np.int32(0),
        "work": np.array(Work(tokens=15, xattn_tokens=15, visuals=2, frames=2), np.int32),
        "computed_tokens": 20,
    }


def test_what_is_held_back_is_written_before_a_save(tmp_path: pathlib.Path) -> None:
    """A run that is killed after the save goes on behind these steps."""
    with watching(tmp_path) as (monitor, processes):
        for step in (1, 2, 3):
            monitor.step(step, metrics(step))
        with monitor.phase("save"):
            pass
        monitor.record(3, {"held_out/loss": 1.0})
        monitor.step(4, metrics(4))
        monitor.finish_steps()
    assert processes.beats == [
        (1, "training", []),
        (2, "training", []),
        (3, "training", []),
        (3, "save", [1, 2, 3]),
        (4, "training", [1, 2, 3, 3]),
    ]
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line.get("loss") for line in lines] == [1, 2, 3, None, 4]
    assert lines[3] == {"step": 3, "held_out/loss": 1.0}
    assert {line["used_token_share"] for line in lines if "loss" in line} == {0.75}
    assert lines[4]["seconds_saving"] >= lines[0]["seconds_saving"] == 0
    assert read_goodput(tmp_path).starts[0].step == 4


def test_a_later_start_cuts_back_and_repeats_nothing(tmp_path: pathlib.Path) -> None:
    with watching(tmp_path) as (monitor, _):
        for step in (1, 2, 3):
            monitor.step(step, metrics(step))
        monitor.record(2, {"held_out/loss": 1.0})
    with watching(tmp_path, start=2) as (monitor, _):
        # As of a run that was killed after its last save, while it was evaluated.
        monitor.record(2, {"held_out/loss": 1.0})
        monitor.step(3, metrics(3))
        monitor.finish_steps()
    steps = [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert steps == [1, 2, 3], "what was held back when the first start ended is not written"


def test_all_is_closed_though_one_fails(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match="full"), watching(tmp_path) as (monitor, _):
        monitor.step(1, metrics(1))
        monkeypatch.setattr(monitor._goodput, "close", full)
    assert monitor._writer._file is not None and monitor._writer._file.closed
    assert json.loads((tmp_path / "goodput.jsonl").read_text().splitlines()[0])["resume"] == 0


def full() -> None:
    raise OSError(28, "the disk is full")
