"""Frozen bytes are checked and read once a run, whatever the number of processes."""

import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.checkpointing.export import export_model, open_export
from flamingo_jax.configuring import to_json
from flamingo_jax.experiment import AttentionConfig, FeedForwardConfig, LanguageModelConfig
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.models.vision import vision_encoder
from flamingo_jax.pytrees import to_flat
from tests.multi_process.run_processes import free_port, results, run
from tests.processes import one_device
from tests.training import world

DEVICES = 4
"""Of every run, whatever its processes."""
CONFIG = LanguageModelConfig(
    vocab_size=32,
    layers=8,
    width=512,
    attention=AttentionConfig(heads=8, head_width=64),
    feed_forward=FeedForwardConfig(width=2048),
)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A language model of 55 MB in many files, which no one has touched lately; a small encoder
    beside it."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("frozen") / "export"

    def write(folder: pathlib.Path, kind: str, config: Any, make: Callable[[], nnx.Module]) -> None:
        shapes = to_flat(nnx.state(nnx.eval_shape(make)))
        drawn = {name: rng.random(s.shape, np.float32) for name, s in shapes.items()}
        parameters = {name: value.astype(ml_dtypes.bfloat16) for name, value in drawn.items()}
        export_model(
            folder,
            kind=kind,
            config=to_json(config),
            shard_bytes=4_000_000,
            parameters=parameters,
        )

    write(folder, "language_model", CONFIG, lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0)))
    vision = world.FLAMINGO.vision

    def make():
        return vision_encoder(vision, rngs=nnx.Rngs(0))

    write(folder.with_name("encoder"), "vision_encoder", vision, make)
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))
    return folder


def load(export: pathlib.Path, other: str, count: int, mesh: str) -> list[dict]:
    """What each of `count` processes tells."""
    environment = one_device() | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count}"
    }
    # Programs that are read from there would be counted too.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    port, encoder = free_port(), str(export.with_name("encoder"))
    module = [sys.executable, "-m", "tests.multi_process.frozen_reader"]
    commands = [
        [*module, str(index), str(count), str(port), str(export), encoder, other, mesh]
        for index in range(count)
    ]
    return results(commands, environment, seconds=200)


@pytest.mark.parametrize(
    ("count", "mesh", "times"),
    # Whole on every device; then over `model`: those who hold columns of the same rows read
    # these.
    [(2, "4x1x1", 1.0), pytest.param(4, "2x1x2", 1.6, marks=pytest.mark.scale)],
)
def test_each_byte_is_hashed_and_read_once_by_all_processes_together(
    count: int, mesh: str, times: float, export: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    size = sum(file.stat().st_size for file in export.iterdir())
    assert size > 50_000_000
    for index in range(count):
        # Copies of their own, as on hosts' own disks: one of them has a bit that turned.
        shutil.copytree(export, tmp_path / f"copy{index}")
    file = sorted((tmp_path / "copy1").glob("model-*.safetensors"))[3]
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    told = load(export, str(tmp_path / "copy{index}"), count, mesh)
    first, again = (np.array([process[time] for process in told]) for time in ("first", "again"))
    print(f"\n{count} processes: {first / size} of the export's bytes, {again / size} again")
    # Once for the digests, once for the devices. Headers and JAX's own files are the rest.
    assert first.sum() < (times + 1.2) * size and first.max() < (times + 1.4) * size / count
    # What was checked in this start is not checked again.
    assert again.sum() < (times + 0.2) * size and again.max() < (times + 0.4) * size / count
    assert {process["digest"] for process in told} == {open_export(export).digest}
    for process in told:
        assert f"{file.name} has another content on some hosts than on others" in process["error"]


@pytest.mark.scale
def test_processes_of_a_run_check_its_encoder_together(
    export: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The real command: its supervisors tell each process when all have come to a gathering."""
    flags = ["--prepare", "--config.training.cache_features", "--config.data.ltip.colour=0.0"]
    encoder = f"--config.vision_encoder_from={export.with_name('encoder')}"
    config = f"tests/end_to_end/small.py:flamingo,{shutil.copytree(data, tmp_path / 'data')}"
    ended = run(2, config, tmp_path / "run", *flags, encoder, devices=1)
    assert all("all is prepared" in log for log in ended.logs)
