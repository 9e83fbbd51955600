"""A folder of executables that stand in for those of a cluster."""

import os
import pathlib

import pytest

from tests.launch.launchers import GCLOUD, PYTHON, SCONTROL, SRUN, executable


@pytest.fixture
def stubs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    for name, text in {
        "python": PYTHON,
        "srun": SRUN,
        "scontrol": SCONTROL,
        "gcloud": GCLOUD,
    }.items():
        executable(tmp_path / "bin" / name, text)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("STUBS", str(tmp_path))
    return tmp_path
