"""The training loop. `train` reads top to bottom: mesh, model and state, monitoring, loop,
end.

The order within the loop is a contract: evaluate the state, save it with the position of the
data it has seen, and only then draw the next batch, update, and write the metrics. So a run
that is killed anywhere resumes without skipping or repeating data.
"""

import contextlib
import logging
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax

from flamingo_jax.distributed.process_group import ProcessGroup, SingleProcess
from flamingo_jax.errors import NotLearnedError, UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.training import overview
from flamingo_jax.training.evaluator import Evaluator, due, evaluate
from flamingo_jax.training.goodput import read_goodput
from flamingo_jax.training.held_out import NAME as HELD_OUT
from flamingo_jax.training.held_out import HeldOutLosses
from flamingo_jax.training.monitor import Monitor
from flamingo_jax.training.prefetcher import DataIterator, HostBatch, Prefetcher, StepInput
from flamingo_jax.training.run import Run, memory_of
from flamingo_jax.training.trackers import check_trackers

log = logging.getLogger(__name__)


class TrainResult(NamedTuple):
    """How a run ended."""

    step: int
    """Steps trained, over all starts."""
    preempted: bool
    """It stopped before `config.training.steps`."""


def train(
    experiment: Experiment,
    iterators: Mapping[str, DataIterator],
    held_out: Mapping[str, Iterable[HostBatch]],
    workdir: pathlib.Path,
    on_start: Callable[[], None] = lambda: None,
    process_group: ProcessGroup | None = None,
    began: float | None = None,
    evaluators: Mapping[str, Evaluator] | None = None,
) -> TrainResult:
    """Trains to `experiment.training.steps`, resuming from the newest intact checkpoint in
    `workdir` if there is one.

    Args:
      iterators: each training dataset's batches, endless.
      held_out: each held-out dataset's batches; their losses are the evaluator "held_out".
      on_start: called once, after config, frozen parts and checkpoint have been checked
        against each other, and before the first file is written.
      process_group: the run's processes; by default a single one.
      began: time.monotonic() when the command began, for goodput.
      evaluators: what else is measured during training, by name.

    Raises: UserError, before any work, for a config that does not fit; NotFiniteError when too
      many steps in a row were not finite; NotLearnedError, after everything is saved, where a
      required loss was not reached.
    """
    training = experiment.training
    _check(experiment, held_out, evaluators or {})
    process_group = process_group or SingleProcess()
    log.info("mesh and model")
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh), contextlib.ExitStack() as ending:
        run = Run(experiment, mesh, iterators, workdir, process_group)
        evaluators = dict(evaluators or {})
        if held_out:
            losses = HeldOutLosses(run.setup, run.task, held_out, experiment, mesh)
            evaluators = {HELD_OUT: losses} | evaluators
        on_start()
        overview.show(run.setup)

        # Undone in reverse order: the signal handlers stay until the last save has ended, so
        # that a second signal does not kill it.
        ending.enter_context(process_group.handling_signals())
        ending.callback(run.close)
        prefetcher = Prefetcher(iterators, mesh, until=process_group.stop_requested)
        monitor = ending.enter_context(Monitor(experiment, run, prefetcher, process_group, began))
        ending.callback(prefetcher.close)
        while run.step < training.steps and not process_group.should_stop(run.step):
            # At the first iteration of a start the state is that of a checkpoint, or
            # untrained: it needs no evaluation and no save.
            is_new = run.step > run.start
            if is_new and (due_now := due(evaluators, run.step)):
                _evaluate(run, due_now, monitor)
            if is_new and run.step % training.save_every == 0:
                _save(run, monitor)
            step_input = next(prefetcher, None)
            if step_input is None:  # Stopped by a signal while waiting for data.
                break
            if not run.is_compiled:
                with monitor.phase("compile"):
                    _compile(run, evaluators, step_input)
                    # Compile times differ: no process may wait in the first step's collectives
                    # for longer than their timeout.
                    process_group.barrier("the first step")
            metrics = run.train_step(step_input)
            if monitor.logs(run.step):
                metrics["parameter_norm"] = run.parameter_norm()
            monitor.step(run.step, metrics)
        monitor.finish_steps()
        if run.step > run.start:
            _save(run, monitor)
        if evaluators and run.step >= training.steps:
            # Also if no step was left to train: the previous start may have been killed during
            # this evaluation.
            _require_learned(training.required_loss, _evaluate(run, evaluators, monitor))
    if jax.process_index() == 0:
        log.info("%s", read_goodput(workdir).sentence())
    return TrainResult(run.step, preempted=run.step < training.steps)


def _check(
    experiment: Experiment, held_out: Mapping[str, object], evaluators: Mapping[str, object]
) -> None:
    """Raises UserError for mistakes that would otherwise fail only at the end of the run."""
    for name in set(experiment.training.required_loss) - set(held_out):
        raise UserError(
            f"config.training.required_loss names {name!r}, which is no held-out dataset: add"
            " it to config.held_out or take it out"
        )
    if HELD_OUT in evaluators:
        raise UserError(
            f"an evaluator is named {HELD_OUT!r}, as the held-out losses are: give it another name"
        )
    check_trackers(experiment.trackers)


def _compile(run: Run, evaluators: Mapping[str, Evaluator], example: StepInput) -> None:
    """Compiles the update and all evaluations before the first step, so that a program that
    does not fit in memory fails now and not after hours.
    """
    run.compile(example)
    for name, evaluator in evaluators.items():
        for what, program in evaluator.compile(run.state.trainable, run.frozen).items():
            log.info("compiled the evaluation %s of %s%s", name, what, memory_of(program))


def _evaluate(run: Run, evaluators: Mapping[str, Evaluator], monitor: Monitor) -> dict[str, float]:
    """Runs evaluators on the current state; records and returns {metric: value}."""
    with monitor.phase("evaluate"):
        values = evaluate(evaluators, run.state.trainable, run.frozen)
    monitor.record(run.step, values)
    return values


def _save(run: Run, monitor: Monitor) -> None:
    with monitor.phase("save"):
        run.save()


def _require_learned(required: Mapping[str, float], values: Mapping[str, float]) -> None:
    """Raises NotLearnedError for a held-out loss above that of `config.training.required_loss`."""
    for name, most in required.items():
        loss = values[f"{HELD_OUT}/{name}/loss_per_token"]
        if not loss <= most:
            raise NotLearnedError(
                f"training ended with a held-out loss per token of {loss:.3f} on {name}, above"
                f" the {most} of config.training.required_loss: go on with a higher"
                " config.training.steps"
            )
