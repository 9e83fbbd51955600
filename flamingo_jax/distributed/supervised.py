"""Whether a process has a supervisor, and by which socket it speaks with it."""

import os

SUPERVISOR_FD = "FLAMINGO_JAX_SUPERVISOR_FD"
"""The environment variable that holds the file descriptor of a supervised process's socket to
its supervisor.
"""


def is_supervised() -> bool:
    """Tells whether a supervisor started this process."""
    return SUPERVISOR_FD in os.environ
