"""Threads for the devices that a CPU stands in for."""

import os
import subprocess
import sys

import pytest

from tests.processes import one_device

SAY = "import os, jax; from flamingo_jax.partitioning.mesh import give_cpu_devices_threads as give; give(); print(os.environ.get('NPROC'), jax.device_count())"


@pytest.mark.parametrize(("setting", "said"), [({}, "None 1"), ({"JAX_NUM_CPU_DEVICES": "4"}, "64 4"), ({"JAX_NUM_CPU_DEVICES": "2", "NPROC": "7"}, "7 2")])
def test_only_several_devices_get_them(setting: dict[str, str], said: str) -> None:
    done = subprocess.run([sys.executable, "-c", SAY], env=one_device() | setting, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == said and os.environ["NPROC"] == "64"
