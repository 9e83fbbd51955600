"""The training loop. Reads top to bottom: mesh, model, state, compilation, loop, ending.

The order within the loop is its contract: evaluate the state, save it with the position of the
data it has seen, and only then draw the next batch, update and write what was measured.
"""

import contextlib
import logging
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import optax

from flamingo_jax.checkpointing.checkpoints import Checkpoints
from flamingo_jax.configuring import from_json, to_json
from flamingo_jax.dataset_identity import identities, require_same_datasets
from flamingo_jax.distributed.process_group import ProcessGroup, SingleProcess
from flamingo_jax.errors import NotLearnedError, UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.progress import Bar
from flamingo_jax.tasks import stages
from flamingo_jax.tasks.flops import peak_flops, step_cost
from flamingo_jax.training.goodput import Goodput, read_goodput
from flamingo_jax.training.held_out import HeldOut
from flamingo_jax.training.metric_writer import MetricWriter
from flamingo_jax.training.metrics_buffer import MetricsBuffer
from flamingo_jax.training.prefetcher import DataIterator, HostBatch, Prefetcher
from flamingo_jax.training.setup import initialise, load_frozen, make_setup, require_same_pretrained
from flamingo_jax.training.state import Parameters, TrainState
from flamingo_jax.training.step import compile_update, laid_out, make_update

log = logging.getLogger(__name__)


class TrainResult(NamedTuple):
    """Tells how a run ended."""

    step: int
    preempted: bool


def train(
    experiment: Experiment,
    iterators: Mapping[str, DataIterator],
    held_out: Mapping[str, Iterable[HostBatch]],
    workdir: pathlib.Path,
    on_start: Callable[[], None] = lambda: None,
    process_group: ProcessGroup | None = None,
    began: float | None = None,
) -> TrainResult:
    """Trains to `experiment.training.steps`, from the newest whole checkpoint in `workdir` if
    there is one.

    `on_start` is called once when everything fits, bases and checkpoint among it, before the
    first file is written. process_group: the run's processes; by default this one is alone. began:
    time.monotonic() when the command began, for goodput.

    Raises: UserError before any work for what does not fit; NotFiniteError when too many steps
    in a row were not finite; NotLearnedError, with everything saved, where a required loss was
    not reached.
    """
    training = experiment.training
    for name in set(training.required_loss) - set(held_out):
        raise UserError(
            f"config.training.required_loss names {name!r}, which is no held-out dataset: add"
            " it to config.held_out or take it out"
        )
    primary, team = jax.process_index() == 0, process_group or SingleProcess()

    log.info("mesh and model")
    mesh = make_mesh(experiment.mesh)
    task = stages.make_task(experiment)
    with jax.set_mesh(mesh):
        setup = make_setup(experiment, mesh)
        frozen, digests = load_frozen(experiment, setup, team)
        datasets = identities(experiment)

        log.info("state")
        keep = {"keep_last": training.keep_last, "keep_every": training.keep_every}
        checkpoints = Checkpoints(workdir / "checkpoints", **keep, process_group=team)
        start = checkpoints.latest() or 0
        clock = {"seconds": 0.0, "starts": 0}
        if start:
            extra = checkpoints.extra(start)
            require_same_pretrained(extra["bases"], digests, workdir)
            _require_same_run(from_json(Experiment, extra["experiment"]), experiment, workdir)
            require_same_datasets(extra.get("datasets", {}), datasets, experiment, workdir)
            state = checkpoints.restore(start, setup.state)
            for name, iterator in iterators.items():
                iterator.set_state(extra["positions"][name])
            clock = extra["clock"]
        else:
            extra = {
                "positions": {name: iterator.get_state() for name, iterator in iterators.items()}
            }
            state = initialise(experiment, setup, team)
        positions = extra["positions"]
        clock["starts"] += 1
        trained = time.monotonic() - clock["seconds"]
        update = make_update(
            setup.graph,
            task,
            setup.optimizer,
            experiment.data,
            training.mixing,
            setup.gradient_shardings,
            setup.schedule,
        )

        on_start()
        writer = MetricWriter(workdir, resume_step=start, enabled=primary)
        prefetcher = Prefetcher(iterators, mesh, until=team.stop_requested)
        buffer = MetricsBuffer(
            training.max_not_finite,
            list(iterators),
            step_cost(experiment),
            _peak(mesh),
            training.log_every,
            training.steps,
        )
        # A pass over all parameters, which only the steps that are written make.
        parameter_norm: Any = jax.jit(optax.global_norm)
        evaluate = HeldOut(setup, task, held_out, experiment.held_out, mesh)
        goodput = Goodput(workdir, start, primary, began)
        compiled = None
        step, seconds_saving = start, 0.0

        @contextlib.contextmanager
        def spending(kind: str) -> Iterator[None]:
            """What is no step, told to whom it concerns."""
            team.heartbeat(step, kind, prefetcher.seconds_waiting)
            with goodput.spending(kind), buffer.paused():
                yield

        def save() -> None:
            nonlocal seconds_saving
            now = clock | {"seconds": time.monotonic() - trained}
            asked = time.monotonic()
            with spending("save"):
                kept = {
                    "positions": positions,
                    "datasets": datasets,
                    "clock": now,
                    "bases": digests,
                }
                checkpoints.save(step, state, kept | {"experiment": to_json(experiment)})
            seconds_saving += time.monotonic() - asked
            goodput.mark(step, prefetcher.seconds_waiting)

        def measure() -> dict[str, float]:
            with spending("evaluate"):
                return evaluate(state, frozen)

        def write(ready: Iterable[tuple[int, dict[str, Any]]], bar: Bar) -> None:
            for number, values in ready:
                values |= {
                    "seconds_waiting": prefetcher.seconds_waiting,
                    "time": time.monotonic() - trained,
                    "seconds_saving": seconds_saving,
                }
                writer.write(number, values)
                goodput.mark(number, prefetcher.seconds_waiting)
                speed = (
                    f"{values['mfu']:.1%} MFU"
                    if "mfu" in values
                    else f"{values['flops_per_second'] / 1e12:.3g} TFLOP/s"
                )
                bar.advance(
                    number - bar.done,
                    f"loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tokens/s "
                    f" {speed}",
                )

        with contextlib.ExitStack() as ending:
            # Called in reverse: a second signal still finds its handler while the last save
            # ends.
            ending.enter_context(team.handling_signals())
            for part in (checkpoints, writer, goodput, prefetcher):
                ending.callback(part.close)
            with Bar(
                experiment.name or experiment.task, training.steps, start=start, enabled=primary
            ) as bar:
                while step < training.steps and not team.should_stop(step):
                    evaluating, saving = (
                        step > start and step % every == 0
                        for every in (training.evaluate_every, training.save_every)
                    )
                    if evaluating or saving:
                        # A run that is killed once this step is saved goes on after it, and
                        # would never write what is held back.
                        write(buffer.drain(), bar)
                    if evaluating:
                        writer.write(step, measure())
                    if saving:
                        save()
                    step_input = next(prefetcher, None)
                    if step_input is None:
                        break
                    if compiled is None:
                        with spending("compile"):
                            compiled = _compile(update, state, frozen, step_input.batches)
                            frozen = laid_out(compiled, frozen)
                            parameter_norm = parameter_norm.lower(state.trainable).compile()
                            # Now, so that what does not fit in memory is known before anything
                            # is trained.
                            for name, program in evaluate.compile(state, frozen).items():
                                log.info(
                                    "compiled the evaluation of %s%s", name, _memory_of(program)
                                )
                            team.barrier("the first step")
                    with jax.transfer_guard("disallow"):
                        state, metrics = compiled(state, frozen, step_input.batches)
                    step, positions = step + 1, step_input.positions
                    team.heartbeat(step, "training", prefetcher.seconds_waiting)
                    if buffer.is_line(step):
                        metrics["parameter_norm"] = parameter_norm(state.trainable)
                    write(buffer.add(step, metrics), bar)
                write(buffer.drain(), bar)
            if step > start:
                save()
            if held_out and step >= training.steps:
                # Also where nothing was left to train: the start before may have been killed in
                # the middle of it.
                values = measure()
                writer.write(step, values)
                _require_learned(training.required_loss, values)
    if primary:
        log.info("%s", read_goodput(workdir).sentence())
    return TrainResult(step, preempted=step < training.steps)


def _compile(update: Any, state: TrainState, frozen: Parameters, batches: Any) -> Any:
    """The update, compiled before the first step so that its memory is known then."""
    began = time.monotonic()
    compiled = compile_update(update, state, frozen, batches)
    log.info("compiled the update in %.0f s%s", time.monotonic() - began, _memory_of(compiled))
    return compiled


def _memory_of(compiled: jax.stages.Compiled) -> str:
    """What a program holds while it runs, where the compiler says so."""
    memory = compiled.memory_analysis()
    return (
        ""
        if memory is None
        else (
            f", {(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20:,.0f} MiB"
            " a device"
        )
    )


def _peak(mesh: jax.sharding.Mesh) -> float | None:
    """FLOPs a second of all devices, if they are of a known kind."""
    peak = peak_flops(mesh.local_devices[0].device_kind)
    return None if peak is None else peak * mesh.size


def _require_same_run(saved: Experiment, current: Experiment, workdir: pathlib.Path) -> None:
    """What the state and the datasets' positions mean nothing without.

    Rates, weights, batches, paths and the mesh may change on the way.
    """

    def held(experiment: Experiment) -> dict[str, Any]:
        field = stages.MODEL_FIELD[experiment.task]
        found: dict[str, Any] = {
            "task": experiment.task,
            "seed": experiment.seed,
            "training.use_visuals": experiment.training.use_visuals,
        }
        for part in stages.PARTS:
            found[f"training.unfreeze_{part}"] = part in stages.unfrozen(experiment)
        found |= {"data": sorted(experiment.data)}
        found |= {
            f"{field}.{key}": value
            for key, value in to_json(stages.model_config(experiment)).items()
        }
        rows = ("kind", "split", "max_length", "visuals", "frames", "pack", "prompt")
        return found | {
            f"data.{name}.{key}": getattr(d, key)
            for name, d in experiment.data.items()
            for key in rows
        }

    before, now = held(saved), held(current)
    for key in [*before, *now]:
        if before.get(key) != now.get(key):
            raise UserError(
                f"the run in {workdir} has config.{key} = {before.get(key)!r}, but it is"
                f" {now.get(key)!r} here: set it back or train in a new workdir"
            )


def _require_learned(required: Mapping[str, float], values: Mapping[str, float]) -> None:
    for name, most in required.items():
        loss = values[f"held_out/{name}/loss_per_token"]
        if not loss <= most:
            raise NotLearnedError(
                f"training ended with a held-out loss per token of {loss:.3f} on {name}, above"
                f" the {most} of config.training.required_loss: go on with a higher"
                " config.training.steps"
            )
