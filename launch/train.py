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

import contextlib
import logging
import pathlib
import signal
import sys
import time
from typing import TYPE_CHECKING

from absl import flags

from flamingo_jax import errors
from flamingo_jax.distributed.coordinator import Timeouts
from flamingo_jax.experiment import Experiment
from flamingo_jax.folder_lock import lock_folder
from flamingo_jax.paths import as_path, compilation_cache, make_folder
from launch import command

if TYPE_CHECKING:
    from flamingo_jax.distributed.process_group import ProcessGroup

BEGAN = time.monotonic()
log = logging.getLogger("launch")

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
        return run(experiment, workdir)
    from flamingo_jax.distributed.coordinator import END
    from flamingo_jax.distributed.process_group import SupervisorClient

    with SupervisorClient(process_info, timeouts) as client:
        client.join(experiment, workdir)
        code = run(experiment, workdir, client)
        # The run ends for all when a process is gone, so wait until the others have finished
        # too.
        client.barrier(END)
        client.leave(code)
        return code


def run(
    experiment: Experiment, workdir: pathlib.Path, process_group: "ProcessGroup | None" = None
) -> int:
    """Runs this process's part of the training, once all processes are connected.

    Returns: the exit code. Raises: StorageError when the storage fails.
    """
    # In a run of several processes the supervisor of process 0 holds the lock; the results of
    # --prepare are not in the workdir.
    alone = process_group is None and not PREPARE.value
    try:
        with lock_folder(workdir, "a run") if alone else contextlib.nullcontext():
            return _run(experiment, workdir, process_group)
    except OSError as error:
        where = f" of {error.filename}" if error.filename else f" in {workdir}"
        raise errors.StorageError(
            f"the storage{where} failed ({error.strerror or error}): mend it and start again;"
            " what was saved is whole"
        ) from error


def _run(
    experiment: Experiment, workdir: pathlib.Path, process_group: "ProcessGroup | None"
) -> int:
    import jax

    from data_pipelines.evaluation_data import PreparedDatasets
    from data_pipelines.iterators import held_out_batches, make_iterators, summary_line
    from data_pipelines.readers import Readers
    from flamingo_jax.evaluation.evaluators.factory import make_evaluators
    from flamingo_jax.partitioning.host_shard import HostShard
    from flamingo_jax.partitioning.mesh import check_batches, make_mesh
    from flamingo_jax.training.frozen_encoder import load_frozen_encoder
    from flamingo_jax.training.loop import train
    from flamingo_jax.training.preflight import check_tokenizer, load_tokenizer
    from flamingo_jax.training.trackers import check_trackers

    check_trackers(experiment.trackers)
    mesh = make_mesh(experiment.mesh)
    check_batches(experiment, mesh)
    host_shard = HostShard.of(mesh)
    tokenizer = load_tokenizer(experiment)
    if not PREPARE.value:
        check_tokenizer(experiment, tokenizer, workdir)
    cached = experiment.training.cache_features
    encoder = load_frozen_encoder(experiment, process_group) if cached else None
    readers = Readers(experiment.training.readers)
    iterators = make_iterators(experiment, tokenizer, encoder, host_shard, readers)
    held_out = held_out_batches(experiment, tokenizer, encoder, host_shard, readers)
    evaluators = make_evaluators(experiment, tokenizer, PreparedDatasets(), mesh)
    for name, iterator in iterators.items():
        log.info("%s: %s", name, summary_line(iterator.summary()))
    if PREPARE.value:
        for iterator in iterators.values():
            iterator.close()
        log.info("all is prepared: the same command without --prepare trains")
        return 0

    def on_start() -> None:
        if jax.process_index():
            return
        # Only now, so that a config that is refused does not replace the one of an earlier
        # run.
        make_folder(workdir)
        command.write_config(experiment, workdir / "config.json")
        tokenizer.save(workdir)

    result = train(
        experiment, iterators, held_out, workdir, on_start, process_group, BEGAN, evaluators
    )
    if result.preempted:
        log.warning(
            "stopped by a signal at step %d and saved: run the same command to go on", result.step
        )
        return errors.EXIT_PREEMPTED
    return 0


if __name__ == "__main__":
    command.run(main)
