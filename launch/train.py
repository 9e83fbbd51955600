r"""Trains one stage, or resumes it where it stopped.

    python -m launch.train --config=configs/quickstart.py:flamingo \
        --workdir=runs/quickstart/flamingo [--config.training.steps=2000 ...]

With --prepare it does everything that comes before the first step and trains nothing: it
checks the config, plans the rows and, if the config caches features, encodes all images with
the frozen encoder. The language model need not exist yet.

Everything is checked before work starts; bad input gives one sentence and exit code 2. SIGTERM
saves and exits with code 75; the same command then resumes. A run with too many steps that are
not finite stops with code 3, one that ends above a required loss with code 4.
"""

import signal
import sys
import time

from absl import flags

from flamingo_jax import errors
from flamingo_jax.distributed.coordinator import Timeouts
from flamingo_jax.paths import as_path, compilation_cache
from launch import command
from launch.training import run

BEGAN = time.monotonic()

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, metrics and the config; made if it is not there."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "host:port of process 0, for a run of several processes that the cluster does not tell of.",
)
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes the run has.")
PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
START_TIMEOUT = flags.DEFINE_float(
    "start_timeout",
    Timeouts().start,
    "Seconds until all processes must have arrived.",
    lower_bound=0.0,
)
LOST_AFTER = flags.DEFINE_float(
    "lost_after",
    Timeouts().lost,
    "Seconds without a word of a process after which the others end.",
    lower_bound=0.0,
)
STEP_TIMEOUT = flags.DEFINE_float(
    "step_timeout",
    Timeouts().step,
    "Seconds without the end of a step after which all processes end.",
    lower_bound=0.0,
)
PREPARE = flags.DEFINE_boolean(
    "prepare", False, "Check the config and make what training reads, but do not train."
)
CONFIG = command.define_config()


def main() -> int:
    """Trains as the flags say; in a run of several processes, first as a supervisor."""
    experiment = command.experiment(CONFIG)
    if not WORKDIR.value:
        raise errors.UserError("--workdir is not set: name a folder for checkpoints and metrics")
    workdir = as_path(WORKDIR.value)
    if workdir.exists() and not workdir.is_dir():
        raise errors.UserError(
            f"--workdir={workdir} is a file: name a folder for checkpoints and metrics"
        )
    # Imported here, since --help and bad input must not wait for jax.
    from flamingo_jax.distributed.process_info import detect_process
    from flamingo_jax.distributed.supervised import is_supervised

    process_info = detect_process(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    timeouts = (
        Timeouts()
        if process_info is None
        else Timeouts(START_TIMEOUT.value, LOST_AFTER.value, STEP_TIMEOUT.value)
    )
    if process_info is not None and not is_supervised():
        from flamingo_jax.distributed.supervisor import supervise

        return supervise(process_info, timeouts, [sys.executable, *sys.orig_argv[1:]], workdir)
    # Until the training loop handles signals there is nothing to save, but launchers that
    # restart by the exit code must see the same one.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(errors.EXIT_PREEMPTED))
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(compilation_cache(workdir)))
    if process_info is None:
        return run(experiment, workdir, prepare=PREPARE.value, began=BEGAN)
    from flamingo_jax.distributed.coordinator import END
    from flamingo_jax.distributed.process_group import SupervisorClient

    with SupervisorClient(process_info, timeouts) as client:
        client.join(experiment, workdir)
        code = run(experiment, workdir, client, prepare=PREPARE.value, began=BEGAN)
        # The run ends for all when a process is gone, so wait until the others have finished
        # too.
        client.barrier(END)
        client.leave(code)
        return code


if __name__ == "__main__":
    command.run(main)
