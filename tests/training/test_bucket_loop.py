"""The training loop with its workdir in a bucket: stopped, resumed and exported there."""

import os
import pathlib
import signal

import numpy as np
import pytest

from flamingo_jax import paths
from flamingo_jax.checkpointing.checkpoints import Checkpoints
from flamingo_jax.json_lines import read_lines
from flamingo_jax.training import loop
from flamingo_jax.training.goodput import read_goodput
from tests.object_store import ObjectStore, object_store, s3_server  # noqa: F401
from tests.training import world


class Stopping(world.Stream):
    """Sends this process SIGTERM as its fourth batch is read."""

    def __next__(self) -> dict[str, np.ndarray]:
        batch = super().__next__()
        if self.position == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch


def lines(workdir: pathlib.Path) -> list[tuple[int, float]]:
    return [
        (line["step"], line["loss"])
        for line in read_lines(workdir / "metrics.jsonl")
        if "loss" in line
    ]


@pytest.mark.scale
def test_stopped_and_resumed_in_a_bucket_the_losses_are_those_of_a_disk(
    object_store: ObjectStore,  # noqa: F811
    tmp_path: pathlib.Path,
) -> None:
    assert loop.train(world.experiment(), world.streams(), {}, tmp_path).step == 6
    object_store.faults.one_in = 20
    bucket = paths.as_path(f"{object_store.address}/run")
    streams = world.streams() | {"m3w": Stopping(world.DATA["m3w"], 0)}
    stopped = loop.train(world.experiment(), streams, {}, bucket)
    assert stopped.preempted and 0 < stopped.step < 6
    assert Checkpoints(bucket / "checkpoints", keep_last=1).latest() == stopped.step
    assert loop.train(world.experiment(), world.streams(), {}, bucket).step == 6
    assert lines(bucket) == lines(tmp_path)
    assert len(read_goodput(bucket).starts) == 2
    events = [path.name for path in (bucket / "tensorboard").iterdir()]
    assert len(events) == 2 and all(name.startswith("events") for name in events)
    assert object_store.faults.failed > 0
