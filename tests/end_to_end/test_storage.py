"""Training on storage that fails: it goes on, or is started again, to the losses that it has on
storage that does not.
"""

import pathlib
import subprocess
import sys

import pytest

from flamingo_jax.errors import EXIT_SAVE_FAILED
from tests.end_to_end.test_kills import ROOT, STEPS, finish, launch, losses
from tests.processes import one_device

STARTS = [
    # Lengths are measured: 24 records a split.
    ("shard:3:1,shard:11:2,shard:20:60", EXIT_SAVE_FAILED),
    # Features are made, and what was measured is read.
    ("info:1:2,shard:14:2,shard:40:60", EXIT_SAVE_FAILED),
    # The first batches.
    ("shard:2:1,feature:2:2,feature:9:60", EXIT_SAVE_FAILED),
    ("lengths:1:2,feature:30:1,feature:120:60", EXIT_SAVE_FAILED),
    ("manifest:1:60", EXIT_SAVE_FAILED),
    ("manifest:1:2,feature:5:1,feature:60:60", EXIT_SAVE_FAILED),
    ("info:1:60", EXIT_SAVE_FAILED),
    ("manifest:1:1,feature:3:2,shard:1:2", 0),
]
"""Faults of each start (see `failing`), 20 in all, and its exit code.

Several threads share the 60 reads that fail in a row.
"""


@pytest.mark.scale
def test_20_faults_of_storage_change_no_loss(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert sum(len(faults.split(",")) for faults, _ in STARTS) == 20
    frozen = tmp_path / "contrastive"
    finish(
        launch(
            "train",
            f"--config=tests/end_to_end/small.py:contrastive,{data}",
            f"--workdir={frozen}",
            "--config.training.steps=3",
        )
    )
    finish(launch("export", f"--workdir={frozen}", f"--output={frozen / 'export'}"))

    def run(workdir: pathlib.Path, faults: str, code: int) -> str:
        command = [
            sys.executable, "-m", "tests.end_to_end.failing", faults, f"--config=tests/end_to_end/small.py:pages,{data}", f"--workdir={workdir}",  # noqa: E501
            f"--config.vision_encoder_from={frozen / 'export'}", "--config.training.cache_features=True",  # noqa: E501
        ]  # fmt: skip
        return finish(
            subprocess.Popen(
                command, cwd=ROOT, env=one_device(), stderr=subprocess.PIPE, text=True
            ),
            code,
        )

    def forget() -> None:
        for path in [*data.glob("*/*/lengths_*"), *data.glob("*/*/features_*/*")]:
            path.unlink()

    forget()
    run(tmp_path / "calm", "", 0)
    expected = losses(tmp_path / "calm")
    assert list(expected) == list(range(1, STEPS + 1))
    forget()
    for faults, code in STARTS:
        told = run(tmp_path / "failing", faults, code)
        count = len(faults.split(","))
        assert f"faults met: {count} of {count}" in told, told
        assert (
            "damaged" not in told.replace("nothing is taken for damaged", "")
            and "masked" not in told
        ), told
        if code:
            assert "start again" in told and "Traceback" not in told, told
    assert losses(tmp_path / "failing") == expected
