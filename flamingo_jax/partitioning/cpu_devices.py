"""Configures XLA for runs in which CPUs simulate several devices, which could otherwise
deadlock.

Imports no jax, so that commands can call it before they know whether they need jax at all.
"""

import os
import sys
from typing import Any

_CPU_THREADS = "64"
_CPU_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler"


def configure_cpu_devices(several_processes: bool = False) -> None:
    """Prevents deadlocks where CPUs simulate several devices, in one process or several. Call
    it before the first device is used.

    XLA:CPU starts a program's loops and collectives as soon as their inputs are ready, in an
    order that differs between devices. A thread that waits in a collective for the other
    devices can thereby block the work that they wait for. So the thread pool (by default one
    thread per device) is made large enough for all that may wait, and the scheduler that
    minimises memory instead of the concurrent one is chosen, so that few wait at a time.

    several_processes: the run has several processes on CPUs.
    """
    # Read as jax would read them: commands come here before the slow import of jax.
    config: Any = sys.modules["jax"].config if "jax" in sys.modules else None
    devices = config.jax_num_cpu_devices if config else _number("JAX_NUM_CPU_DEVICES")
    platforms = config.jax_platforms if config else os.environ.get("JAX_PLATFORMS")
    flags = os.environ.get("XLA_FLAGS", "")
    several_devices = "--xla_force_host_platform_device_count" in flags or devices > 1
    if several_devices or (several_processes and platforms == "cpu"):
        os.environ.setdefault("NPROC", _CPU_THREADS)
        if _CPU_ORDER not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {_CPU_ORDER}=false".strip()


def _number(variable: str) -> int:
    """Reads an environment variable as a number; 0 where it is unset or none."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0
