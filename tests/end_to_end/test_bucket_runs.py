"""A run whose workdir is in a bucket: killed, resumed, exported and evaluated there, while one
request in twenty fails.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from flamingo_jax import paths
from flamingo_jax.checkpointing.export import open_export
from flamingo_jax.errors import EXIT_BAD_INPUT
from tests.end_to_end.test_kills import ROOT, finish, launch, losses, wait_for
from tests.object_store import ObjectStore, object_store, s3_server  # noqa: F401

STEPS = 30


@pytest.mark.scale
def test_killed_resumed_exported_and_evaluated_in_a_bucket(
    data: pathlib.Path,
    object_store: ObjectStore,  # noqa: F811
    tmp_path: pathlib.Path,
) -> None:
    config = f"--config=tests/end_to_end/small.py:pages,{data}"
    finish(launch("train", config, f"--workdir={tmp_path}"))
    unbroken = losses(tmp_path)
    assert list(unbroken) == list(range(1, STEPS + 1))

    object_store.faults.one_in = 20
    place = f"{object_store.address}/run"
    workdir = paths.as_path(place)
    for kill in (7, 19):
        process = launch("train", config, f"--workdir={place}")
        wait_for(kill, workdir, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finish(launch("train", config, f"--workdir={place}"))
    assert losses(workdir) == unbroken
    assert sorted(map(int, paths.subfolders(workdir / "checkpoints"))) == [27, 30]
    assert any(path.name.startswith("events") for path in (workdir / "tensorboard").iterdir())
    assert not [path for path in workdir.iterdir() if path.name.startswith(".holder")]

    told = subprocess.run(
        [sys.executable, "-m", "launch.goodput", f"--workdir={place}", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(told.stdout)["starts"]) == 3

    exported = f"{object_store.address}/export"
    finish(launch("export", f"--workdir={place}", f"--output={exported}"))
    finish(launch("export", f"--workdir={tmp_path}", f"--output={tmp_path / 'export'}"))
    ours, local = open_export(exported), open_export(tmp_path / "export")
    assert ours.names == local.names
    for name, value in local.read().items():
        assert (ours.read(name)[name] == value).all()
    refused = finish(
        launch("export", f"--workdir={place}", f"--output={exported}"), code=EXIT_BAD_INPUT
    )
    assert "is there already" in refused

    figures = []
    for model in (exported, str(tmp_path / "export")):
        output = tmp_path / f"figures{len(figures)}"
        finish(
            launch(
                "evaluate",
                f"--model={model}",
                f"--benchmark=captioning:photos={data / 'ltip'}:validation",
                "--shots=0",
                "--limit=4",
                f"--output={output}",
            )
        )
        figures.append(json.loads((output / "report.json").read_text())["benchmarks"])
    assert figures[0] == figures[1]
    assert object_store.faults.failed > 20
