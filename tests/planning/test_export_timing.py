"""A run that is made for timing its export is a run, and its export holds what was saved; in
processes of their own it is killed and continued.
"""

import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs.benchmark import sized
from flamingo_jax.checkpointing.export import open_export
from flamingo_jax.errors import UserError
from flamingo_jax.planning.export_timing import make_run, time_export
from flamingo_jax.training.exporting import export_run
from tests.launch import commands


def test_a_made_run_is_exported_as_it_was_saved(tmp_path: pathlib.Path) -> None:
    made = make_run(sized(0.002), tmp_path / "made")
    export_run(tmp_path / "made/run", tmp_path / "export")
    found = open_export(tmp_path / "export").read()
    parts = {
        part: open_export(tmp_path / "made" / part).read()
        for part in ("vision_encoder", "language_model")
    }
    expected = {f"{part}/{n}": v for part, values in parts.items() for n, v in values.items()}
    # Read by orbax alone.
    with ocp.StandardCheckpointer() as orbax:
        step = tmp_path / "made/run/checkpoints" / str(made.training.steps)
        saved = orbax.restore(step / "state/trainable")
    for name, value in saved.items():
        expected[name.removeprefix("trainable/")] = np.asarray(jax.device_get(value))
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.scale
def test_an_export_takes_little_memory_and_is_continued(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within 1.2 times the largest parameter and a GiB; `python -m launch.benchmark export`
    measures the speed too, at 8 GB.
    """
    timing = time_export(sized(1.0), tmp_path / "made")
    print(timing)
    assert 0.8e9 < timing.bytes < 1.2e9 and timing.equal
    assert 0 < timing.kept <= timing.files and not (tmp_path / "made").exists()
    assert timing.grown <= 1.2 * timing.largest + 2**30


def test_the_command_wants_a_folder() -> None:
    benchmark = commands.load("benchmark")
    with pytest.raises(UserError, match="--folder is not set"):
        benchmark.export()
