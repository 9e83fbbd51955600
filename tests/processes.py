"""The environment of the commands that tests start."""

import os


def one_device() -> dict[str, str]:
    """This process's environment without what makes its eight CPU devices."""
    return {
        name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")
    } | {"JAX_PLATFORMS": "cpu"}
