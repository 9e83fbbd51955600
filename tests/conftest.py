"""Every test runs on eight host CPU devices, with compiled programs kept between runs."""

import getpass
import os
import pathlib
import tempfile

# Set before JAX is imported; children of the tests inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Most of the tests' time is LLVM's, and they run each program a few times.
        "--xla_backend_optimization_level=0",
        # Eight devices share few cores: a slow machine is not a deadlock.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
).strip()
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(tempfile.gettempdir()) / f"flamingo_jax_tests_{getpass.getuser()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

from absl import flags  # noqa: E402

from flamingo_jax.partitioning.cpu_devices import configure_cpu_devices  # noqa: E402

configure_cpu_devices()
# grain's workers read absl's flags, which pytest never parses.
flags.FLAGS.mark_as_parsed()
