"""Two processes that share a mesh load what their devices need, and get the results of one."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from tests.inference.meshes import exported, model_of_eight_heads, require_equal
from tests.multi_process.run_processes import ROOT, free_port
from tests.processes import one_device

READER = [sys.executable, "-m", "tests.multi_process.inference_reader"]


def use(export: pathlib.Path, count: int, mesh: str, devices: int = 2) -> list[dict[str, Any]]:
    """What each of `count` processes tells."""
    environment = one_device() | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
        " --xla_backend_optimization_level=0"
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    }
    port = free_port()
    processes = [
        subprocess.Popen(
            [*READER, str(index), str(count), str(port), str(export), mesh],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        ended = [process.communicate(timeout=220) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(e for _, e in ended)
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


@pytest.mark.scale
@pytest.mark.parametrize("mesh", ["data=2,model=2", "model=4", "fsdp=4"])
def test_every_process_gets_the_results_of_one(mesh: str, tmp_path: pathlib.Path) -> None:
    export = exported(model_of_eight_heads(), tmp_path)
    (alone,) = use(export, 1, "", devices=1)
    both = use(export, 2, mesh)
    for told in both:
        require_equal(told["results"], alone["results"])
    # Where `model` crosses the processes, neither holds what the other's devices need.
    if mesh == "model=4":
        assert max(told["held"] for told in both) < 0.75 * alone["held"]
