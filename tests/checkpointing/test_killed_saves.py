"""A process that is killed while it saves leaves whole steps alone."""

import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from flamingo_jax.checkpointing.checkpoints import Checkpoints
from tests.processes import one_device

SAVES_FOR_EVER = """
import sys, itertools, jax.numpy as jnp
from flamingo_jax.checkpointing.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep_last=2)
start = checkpoints.latest() or 0
if start:
    import jax
    state = checkpoints.restore(start, {"w": jax.ShapeDtypeStruct((300, 300), jnp.float32)})
    assert float(state["w"].min()) == float(state["w"].max()) == start == checkpoints.extra(start)["step"]
for step in itertools.count(start + 1):
    checkpoints.save(step, {"w": jnp.full((300, 300), step, jnp.float32)}, {"step": step})
    print(step, flush=True)
"""  # noqa: E501


def test_killed_while_it_saves_it_leaves_whole_steps_alone(tmp_path: pathlib.Path) -> None:
    newest = 0
    for delay in (0.013, 0.004):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVES_FOR_EVER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=pathlib.Path(__file__).parents[2],
            env=one_device(),
        )
        assert process.stdout is not None
        first = int(process.stdout.readline() or -1)
        assert first == newest + 1, "the restart goes on from the newest whole step"
        reached = int(process.stdout.readline())
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        step = Checkpoints(tmp_path, keep_last=1).latest()
        assert step is not None and step >= reached - 1, "all but the save in flight is whole"
        newest = step
        state = Checkpoints(tmp_path, keep_last=1).restore(
            step, {"w": jax.ShapeDtypeStruct((300, 300), jnp.float32)}
        )
        np.testing.assert_array_equal(state["w"], np.full((300, 300), step))
