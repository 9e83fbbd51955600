"""CPUs that stand in for several devices: what keeps their steps from waiting for themselves.

Imports no jax, so that commands may ask for it before they know whether they need that.
"""

import os
import sys
from typing import Any

_CPU_THREADS = "64"
_CPU_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler"


def configure_cpu_devices(several_processes: bool = False) -> None:
    """Keeps steps from waiting for themselves where CPUs stand in for several devices, of one
    process or of several; to be called before one is used.

    XLA:CPU starts a program's loops and collectives as soon as their inputs are there, in
    another order on each device, and a thread that waits in one for the other devices can hold
    up what they wait for. So threads are given for all that may wait, by default one a device,
    and instructions are ordered to save memory rather than to run at once, so that few wait
    together.
    """
    # What jax would read itself: commands come here before it is imported, which takes long.
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
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0
