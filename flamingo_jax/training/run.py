"""A run in its workdir: the training state and data positions, how they are initialised,
restored, updated and saved.
"""

import logging
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import optax

from flamingo_jax.checkpointing.checkpoints import Checkpoints
from flamingo_jax.configuring import flatten, from_json, to_json
from flamingo_jax.dataset_identity import identities, require_same_datasets
from flamingo_jax.distributed.process_group import ProcessGroup
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.tasks import stages
from flamingo_jax.tasks.flops import computed_tokens
from flamingo_jax.training.prefetcher import DataIterator, StepInput
from flamingo_jax.training.pretrained import load_frozen, require_same_pretrained
from flamingo_jax.training.setup import initialise, make_setup
from flamingo_jax.training.step import compile_update, laid_out, make_update

log = logging.getLogger(__name__)


class RunClock:
    """Counts a run's wall time in seconds, over all of its starts.

    Args:
      seconds, starts: of the starts before this one.
    """

    def __init__(self, seconds: float = 0.0, starts: int = 0):
        self._began = time.monotonic() - seconds
        self._starts = starts + 1

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def saved(self) -> dict[str, float]:
        """Returns the arguments of the `RunClock` that continues this one, for a checkpoint."""
        return {"seconds": self.seconds, "starts": self._starts}


class Run:
    """The state of a run: restored from the newest intact checkpoint of `workdir`, or
    initialised if there is none.

    `state` and `positions` always belong together: positions are those after the data that the
    state was trained on.

    Raises: UserError where frozen parts, model, task or datasets differ from those that the
      checkpoint was trained with.
    """

    def __init__(
        self,
        experiment: Experiment,
        mesh: jax.sharding.Mesh,
        iterators: Mapping[str, DataIterator],
        workdir: pathlib.Path,
        process_group: ProcessGroup,
    ):
        training = experiment.training
        self._experiment, self.workdir, self.mesh = experiment, workdir, mesh
        self.task = stages.make_task(experiment)
        self.setup = make_setup(experiment, mesh)
        self.frozen, self._pretrained = load_frozen(experiment, self.setup.frozen, process_group)
        self._datasets = identities(experiment)
        log.info("state")
        self._checkpoints = Checkpoints(
            workdir / "checkpoints",
            keep_last=training.keep_last,
            keep_every=training.keep_every,
            process_group=process_group,
        )
        self.start = self.step = self._checkpoints.latest() or 0
        """The step that this start resumes from, and the current one."""
        if self.start:
            self._restore(iterators)
        else:
            self.state = initialise(experiment, self.setup, process_group)
            self.positions = {name: iterator.get_state() for name, iterator in iterators.items()}
            self.clock = RunClock()
        self._update = make_update(
            self.setup.graph,
            self.task,
            self.setup.optimizer,
            experiment.data,
            training.round_robin,
            self.setup.gradient_shardings,
            self.setup.schedule,
        )
        self._step: jax.stages.Compiled | None = None
        self._norm: jax.stages.Compiled | None = None

    def _restore(self, iterators: Mapping[str, DataIterator]) -> None:
        """Restores state, positions and clock from the checkpoint, after checking that it was
        made by this experiment.
        """
        extra = self._checkpoints.extra(self.start)
        require_same_pretrained(extra["pretrained"], self._pretrained, self.workdir)
        saved = from_json(Experiment, extra["experiment"])
        require_same_run(saved, self._experiment, self.workdir)
        require_same_datasets(
            extra.get("datasets", {}), self._datasets, self._experiment, self.workdir
        )
        self.state = self._checkpoints.restore(self.start, self.setup.state)
        self.positions = extra["positions"]
        for name, iterator in iterators.items():
            iterator.set_state(self.positions[name])
        self.clock = RunClock(**extra["clock"])

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` has been called."""
        return self._step is not None

    def compile(self, example: StepInput) -> None:
        """Compiles the update for batches like `example`, so that running out of memory shows
        before the first step, and brings frozen parameters into the layout that it expects.
        """
        began = time.monotonic()
        self._step = compile_update(self._update, self.state, self.frozen, example.batches)
        seconds, memory = time.monotonic() - began, memory_of(self._step)
        log.info("compiled the update in %.0f s%s", seconds, memory)
        self.frozen = laid_out(self._step, self.frozen)
        # Compiled here too, so that no logged step waits for a compilation.
        self._norm = jax.jit(optax.global_norm).lower(self.state.trainable).compile()

    def train_step(self, step_input: StepInput) -> dict[str, Any]:
        """Updates the state; returns the step's metrics, still on the devices."""
        assert self._step is not None
        # Nothing may move between host and devices here: an implicit transfer would stall
        # them.
        with jax.transfer_guard("disallow"):
            self.state, metrics = self._step(self.state, self.frozen, step_input.batches)
        self.step, self.positions = self.step + 1, step_input.positions
        return metrics | {"computed_tokens": computed_tokens(step_input.batches.values())}

    def parameter_norm(self) -> jax.Array:
        """Computes the global norm of the trained parameters; it reads all of them."""
        assert self._norm is not None
        return self._norm(self.state.trainable)

    def save(self) -> None:
        """Saves the state, the data positions, and what `_restore` checks; files are written
        in the background.
        """
        self._checkpoints.save(
            self.step,
            self.state,
            {
                "positions": self.positions,
                "datasets": self._datasets,
                "clock": self.clock.saved(),
                "pretrained": self._pretrained,
                "experiment": to_json(self._experiment),
            },
        )

    def close(self) -> None:
        """Waits until the last checkpoint is on disk."""
        self._checkpoints.close()


def memory_of(compiled: jax.stages.Compiled) -> str:
    """Formats the memory of a compiled program, as ", 812 MiB a device"; "" where unknown."""
    memory = compiled.memory_analysis()
    if memory is None:
        return ""
    size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return f", {size / 2**20:,.0f} MiB a device"


DATASET_MEANING = ("kind", "split", "max_length", "visuals", "frames", "pack", "prompt")
"""Fields of a dataset's config that its saved positions depend on."""


def require_same_run(saved: Experiment, current: Experiment, workdir: pathlib.Path) -> None:
    """Raises UserError where a checkpoint's state or data positions do not fit the current
    config.

    Learning rates, dataset weights, batch sizes, paths and the mesh may change between starts.
    """
    before, now = _meaning(saved), _meaning(current)
    for key in [*before, *now]:
        if before.get(key) != now.get(key):
            raise UserError(
                f"the run in {workdir} has config.{key} = {before.get(key)!r}, but it is"
                f" {now.get(key)!r} here: set it back or train in a new workdir"
            )


def _meaning(experiment: Experiment) -> dict[str, Any]:
    """Returns the config keys that a checkpoint depends on, with their values."""
    field = stages.MODEL_FIELD[experiment.task]
    model = flatten(to_json(stages.model_config(experiment)), field)
    return {
        "task": experiment.task,
        "seed": experiment.seed,
        "training.use_visuals": experiment.training.use_visuals,
        **{
            f"training.unfreeze_{part}": part in stages.unfrozen(experiment)
            for part in stages.PARTS
        },
        **flatten(to_json(experiment.training.lora), "training.lora"),
        "training.frozen_dtype": experiment.training.frozen_dtype,
        "data": sorted(experiment.data),
        **model,
        **{
            f"data.{name}.{key}": getattr(dataset, key)
            for name, dataset in experiment.data.items()
            for key in DATASET_MEANING
        },
    }
