"""Tells a process whether a supervisor started it, and the socket that connects the two.

In a file of its own, so that a command can check this before it imports jax.
"""

import os

SUPERVISOR_FD = "FLAMINGO_JAX_SUPERVISOR_FD"
"""The environment variable with the file descriptor of the socket to the supervisor."""


def is_supervised() -> bool:
    """Tells whether a supervisor started this process."""
    return SUPERVISOR_FD in os.environ
