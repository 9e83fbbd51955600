"""Two processes that share a mesh load what their devices need, and get the results of one."""

import dataclasses
import pathlib
import sys
from typing import Any

import numpy as np
import pytest
from flax import nnx

from flamingo_jax.experiment import FeedForwardConfig
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.pytrees import to_flat
from tests.inference.meshes import exported, model_of_eight_heads, require_equal
from tests.multi_process.run_processes import free_port, results
from tests.processes import one_device

READER = [sys.executable, "-m", "tests.multi_process.inference_reader"]


def use(
    export: pathlib.Path, count: int, mesh: str, *only: str, devices: int = 2
) -> list[dict[str, Any]]:
    """What each of `count` processes tells."""
    environment = one_device() | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
        " --xla_backend_optimization_level=0"
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    }
    port = free_port()
    commands = [
        [*READER, str(index), str(count), str(port), str(export), mesh, *only]
        for index in range(count)
    ]
    return results(commands, environment, seconds=220)


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


@pytest.mark.scale
def test_a_process_takes_the_memory_of_its_own_shards(tmp_path: pathlib.Path) -> None:
    small = model_of_eight_heads()
    language_model = dataclasses.replace(
        small.config.language_model,
        layers=12,
        width=1024,
        feed_forward=FeedForwardConfig(width=4096),
    )
    config = dataclasses.replace(small.config, language_model=language_model)
    shapes = to_flat(nnx.split(nnx.eval_shape(lambda: Flamingo(config, rngs=nnx.Rngs(0))))[1])
    parameters = {name: np.zeros(s.shape, np.float32) for name, s in shapes.items()}
    whole = sum(a.nbytes for a in parameters.values())
    largest = max(a.nbytes for a in parameters.values())
    export = exported(dataclasses.replace(small, config=config), tmp_path, parameters)
    both = use(export, 2, "model=2", "load", devices=1)
    for told in both:
        print(f"of {whole / 2**20:.0f} MiB holds {told['held'] / 2**20:.0f}, took", end=" ")
        print(f"{told['taken'] / 2**20:.0f}, the largest parameter is {largest / 2**20:.0f}")
        assert told["held"] < 0.55 * whole
        assert told["taken"] < told["held"] + largest + 100 * 2**20
