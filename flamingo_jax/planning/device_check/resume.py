"""Checks that a run which is stopped and resumed from its checkpoint is the run that went on, to
the last bit.
"""

import tempfile
from typing import Any

import jax
import numpy as np

from flamingo_jax.checkpointing.checkpoints import Checkpoints
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.planning.device_check.sections import Budget, CheckFailed, Results
from flamingo_jax.planning.device_check.sizes import DeviceCheckSize
from flamingo_jax.planning.device_check.step import in_parts
from flamingo_jax.planning.timing import RunningStep

STEPS = 3
"""Before the checkpoint, and after it."""


def check_resume(size: DeviceCheckSize, results: Results, budget: Budget) -> None:
    """Trains on, and again from a checkpoint in a program that is compiled anew, as after a
    restart; compares all arrays of the state bit by bit.

    Deterministic sums are set by the environment of the section's process. Nothing of it depends
    on time, so that `budget` is only kept by the process that runs it.

    Raises: CheckFailed with the first array that differs.
    """
    experiment = in_parts(size.resume, 1)
    mesh = make_mesh(experiment.mesh)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        checkpoints = Checkpoints(folder, keep_last=1)
        try:
            step = RunningStep(experiment, mesh)
            before = _host(step.state)
            _run(step)
            checkpoints.save(STEPS, step.state, {})
            losses = _run(step)
            expected = _host(step.state)
            results.put("losses", losses)
            # The next process compiles anew, and may be given other kernels.
            jax.clear_caches()
            step = RunningStep(experiment, mesh)
            step.state = checkpoints.restore(checkpoints.latest() or 0, step.setup.state)
            again = _run(step)
        finally:
            checkpoints.close()
        results.put("losses_after_resuming", again)
        found = _host(step.state)
    differ = [name for name in expected if found[name].tobytes() != expected[name].tobytes()]
    moved = sum(before[name].tobytes() != expected[name].tobytes() for name in expected)
    results.put("arrays", len(expected))
    results.put("arrays_that_training_changed", moved)
    results.put("arrays_that_differ", differ)
    if not moved:
        raise CheckFailed("training changed nothing, so that the comparison says nothing")
    if differ:
        raise CheckFailed(
            f"{len(differ)} of {len(expected)} arrays differ after resuming, {differ[0]} first"
        )


def _run(step: RunningStep) -> list[float]:
    return [float(jax.block_until_ready(step())["loss"]) for _ in range(STEPS)]


def _host(state: Any) -> dict[str, np.ndarray]:
    """Copies all arrays of the state to the host, by name."""
    leaves = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}
