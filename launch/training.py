"""Trains an experiment in a workdir, once flags are parsed and processes connected: what
launch.train and launch.fine_tune share.
"""

import contextlib
import logging
import pathlib
from typing import TYPE_CHECKING

from flamingo_jax import errors
from flamingo_jax.experiment import Experiment
from flamingo_jax.folder_lock import lock_folder
from flamingo_jax.paths import make_folder
from launch import command

if TYPE_CHECKING:
    from flamingo_jax.distributed.process_group import ProcessGroup

log = logging.getLogger("launch")


def run(
    experiment: Experiment,
    workdir: pathlib.Path,
    process_group: "ProcessGroup | None" = None,
    *,
    prepare: bool = False,
    began: float | None = None,
) -> int:
    """Runs this process's part of the training, once all processes are connected.

    Args:
      process_group: the run's processes; None for a single one.
      prepare: do all that comes before the first step, and train nothing.
      began: time.monotonic() when the command began, for goodput.

    Returns: the exit code. Raises: StorageError when the storage fails.
    """
    # In a run of several processes the supervisor of process 0 holds the lock; the results of
    # --prepare are not in the workdir.
    alone = process_group is None and not prepare
    try:
        with lock_folder(workdir, "a run") if alone else contextlib.nullcontext():
            return _run(experiment, workdir, process_group, prepare, began)
    except OSError as error:
        where = f" of {error.filename}" if error.filename else f" in {workdir}"
        raise errors.StorageError(
            f"the storage{where} failed ({error.strerror or error}): mend it and start again;"
            " what was saved is whole"
        ) from error


def _run(
    experiment: Experiment,
    workdir: pathlib.Path,
    process_group: "ProcessGroup | None",
    prepare: bool,
    began: float | None,
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
    if not prepare:
        check_tokenizer(experiment, tokenizer, workdir)
    cached = experiment.training.cache_features
    encoder = load_frozen_encoder(experiment, process_group) if cached else None
    readers = Readers(experiment.training.readers)
    iterators = make_iterators(experiment, tokenizer, encoder, host_shard, readers)
    held_out = held_out_batches(experiment, tokenizer, encoder, host_shard, readers)
    evaluators = make_evaluators(experiment, tokenizer, PreparedDatasets(), mesh)
    for name, iterator in iterators.items():
        log.info("%s: %s", name, summary_line(iterator.summary()))
    if prepare:
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
        experiment, iterators, held_out, workdir, on_start, process_group, began, evaluators
    )
    if result.preempted:
        log.warning(
            "stopped by a signal at step %d and saved: run the same command to go on", result.step
        )
        return errors.EXIT_PREEMPTED
    return 0
