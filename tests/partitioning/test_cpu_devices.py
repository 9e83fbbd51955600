"""What keeps the steps of devices that a CPU stands in for from waiting for themselves."""

import subprocess
import sys

import pytest

from tests.processes import one_device

SAY = """
import {imported}
from flamingo_jax.partitioning.cpu_devices import configure_cpu_devices
configure_cpu_devices(len(sys.argv) > 1)
import jax
print(os.environ.get("NPROC"), os.environ.get("XLA_FLAGS"), jax.device_count())
"""
ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler"


@pytest.mark.parametrize(
    ("setting", "processes", "said"),
    [
        ({}, [], "None None 1"),
        ({}, ["several"], f"64 {ORDER}=false 1"),
        ({"JAX_NUM_CPU_DEVICES": "4"}, [], f"64 {ORDER}=false 4"),
        (
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"},
            [],
            f"64 --xla_force_host_platform_device_count=3 {ORDER}=false 3",
        ),
        (
            {"JAX_NUM_CPU_DEVICES": "2", "NPROC": "7", "XLA_FLAGS": f"{ORDER}=true"},
            [],
            f"7 {ORDER}=true 2",
        ),
    ],
)
@pytest.mark.parametrize("imported", ["os, sys, jax", "os, sys"])
def test_only_several_devices_or_processes_are_settled(
    setting: dict[str, str], processes: list[str], said: str, imported: str
) -> None:
    """Before jax is imported as after it."""
    done = subprocess.run(
        [sys.executable, "-c", SAY.format(imported=imported), *processes],
        env=one_device() | setting,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == said
