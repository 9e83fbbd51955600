"""What the cluster launchers start trains: a pod, a job and a machine, on this one."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

from data_pipelines.build.synthetic_world import build_quickstart
from tests.launch.launchers import (
    ROOT,
    SLURM,
    commit,
    executable,
    jobset,
    lines,
    tpu,
    until,
)
from tests.processes import one_device


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The storage of a cluster: the datasets and the tokenizer that tiny forms read."""
    folder = tmp_path_factory.mktemp("shared")
    build_quickstart(folder / "data", limit=8)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The image's working folder: what the Dockerfile copies there, and nothing else."""
    folder = tmp_path_factory.mktemp("image")
    for line in lines(ROOT / "launch/gke/Dockerfile"):
        for name in line.split()[1:-1] if line.startswith("COPY") else ():
            if (ROOT / name).is_dir():
                shutil.copytree(
                    ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy(ROOT / name, folder)
    return folder


REAL_PYTHON = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
STEPS = ("--config.training.steps=1", "--config.training.evaluate_batches=1")


def there(environment: dict[str, str], folder: pathlib.Path) -> dict[str, str]:
    """A machine's environment: its own python comes first."""
    return one_device() | environment | {"PATH": f"{folder}/bin:{os.environ['PATH']}"}


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_a_pod_of_the_jobset_starts(
    name: str, image: pathlib.Path, shared: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The container's own command, in the image's folder and with the claim mounted; but for
    the size of the model and the other pods.
    """
    _, _, container = jobset(name)
    executable(tmp_path / "bin/python", REAL_PYTHON)

    def here(text: str) -> str:
        return re.sub(r"form=\w+", "form=tiny", text).replace("/shared", str(shared))

    arguments = [here(word) for word in container["args"] if ".mesh." not in word]
    environment = {v["name"]: here(v["value"]) for v in container["env"] if "value" in v}
    alone = {"JAX_NUM_PROCESSES": "1"}
    done = subprocess.run(
        [*container["command"], *arguments, "--prepare"],
        cwd=image,
        env=there(environment | alone, tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "all is prepared" in done.stderr, done.stderr


def test_a_slurm_job_trains(image: pathlib.Path, shared: pathlib.Path, stubs: pathlib.Path) -> None:
    executable(stubs / "bin/python", REAL_PYTHON)
    flags = [
        f"--config=configs/lm_1b4.py:form=tiny,root={shared}",
        f"--workdir={shared}/runs/job",
        *STEPS,
    ]
    task = {
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "node3",
    }
    task |= {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "2"}
    folder = shutil.copytree(image, stubs / "repository")
    script = shutil.copy(SLURM, stubs)
    done = subprocess.run(
        [script, *flags], cwd=folder, env=there(task, stubs), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (shared / "runs/job/checkpoints/1/manifest.json").exists()
    assert lines(folder / "srun")[2] == "--cpus-per-task=2"


def test_a_tpu_machine_trains(
    image: pathlib.Path,
    shared: pathlib.Path,
    stubs: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Set up from the commit, started by its own command, ended by itself."""
    for name in ("sudo", "python3.11"):
        executable(stubs / "bin" / name, "#!/bin/bash\n")
    commit(stubs)
    shutil.copytree(image, stubs / "commit")
    shutil.copytree(ROOT / "launch/tpu_vm", stubs / "commit/launch/tpu_vm", dirs_exist_ok=True)
    machine = stubs / "n/flamingo_jax"
    executable(machine / ".venv/bin/pip", "#!/bin/bash\n")
    executable(machine / ".venv/bin/python", REAL_PYTHON)
    tpu(stubs, "setup")
    monkeypatch.delenv("XLA_FLAGS")
    tpu(
        stubs,
        "start",
        f"--config=configs/lm_1b4.py:form=tiny,root={shared}",
        f"--workdir={shared}/runs/vm",
        *STEPS,
        JAX_COMPILATION_CACHE_DIR=os.environ["JAX_COMPILATION_CACHE_DIR"],
    )
    until(lambda: (machine / "again.pid").exists())
    for _ in range(600):
        if not (machine / "again.pid").exists():
            break
        time.sleep(0.1)
    assert (shared / "runs/vm/checkpoints/1/manifest.json").exists(), (
        machine / "train.log"
    ).read_text()


def test_the_image_holds_every_package() -> None:
    copied = {
        line.split()[1] for line in lines(ROOT / "launch/gke/Dockerfile") if line.startswith("COPY")
    }
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"} <= copied
