"""Loads the newest intact checkpoint of a run, without changing its workdir."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from flamingo_jax import configuring, errors
from flamingo_jax.checkpointing import manifest
from flamingo_jax.checkpointing.checkpoints import Checkpoints
from flamingo_jax.experiment import Experiment, LoRAConfig, MeshConfig
from flamingo_jax.interop.weight_sources import open_model
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.processing.tokenizer import FILE_NAME, tokenizer_file
from flamingo_jax.training.pretrained import load_frozen, require_same_pretrained
from flamingo_jax.training.setup import TrainSetup, make_setup
from flamingo_jax.training.state import Parameters

log = logging.getLogger(__name__)


class TrainedRun(NamedTuple):
    """A run's parameters at its newest intact checkpoint.

    newer: {step of a newer checkpoint: why it was not used}.
    """

    workdir: pathlib.Path
    experiment: Experiment
    mesh: Mesh
    setup: TrainSetup
    step: int
    newer: Mapping[int, str]
    trainable: Parameters
    frozen: Parameters

    @property
    def tokenizer_file(self) -> pathlib.Path:
        """The tokenizer that the run was trained with."""
        return run_tokenizer(self.workdir)


def run_tokenizer(workdir: pathlib.Path) -> pathlib.Path:
    """Returns the tokenizer in a workdir, or where it should be."""
    return tokenizer_file(workdir) or workdir / FILE_NAME


def read_experiment(workdir: pathlib.Path) -> Experiment:
    """Reads the config of the run in a workdir.

    Raises: UserError where there is none; StorageError where reading fails at the moment.
    """
    try:
        text = manifest.retry_read((workdir / "config.json").read_text)
    except (FileNotFoundError, NotADirectoryError):
        raise errors.UserError(
            f"--workdir={workdir} holds no config.json: name the folder of a training run"
        ) from None
    except OSError as error:
        raise manifest.unreadable(workdir, error) from error
    return configuring.from_json(Experiment, json.loads(text))


def open_newest(
    workdir: pathlib.Path, experiment: Experiment, *, parameters_only: bool = False
) -> tuple[Checkpoints, int, Mapping[int, str]]:
    """Opens the checkpoints in a workdir; returns them, the newest intact step, and the newer
    ones that are not intact with the reason. parameters_only: as `Checkpoints.newest`.

    Raises: UserError where there is no intact checkpoint.
    """
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep_last=experiment.training.keep_last,
        keep_every=experiment.training.keep_every,
    )
    step, newer = checkpoints.newest(parameters_only=parameters_only)
    if step is None:
        raise errors.UserError(f"{workdir} has no whole checkpoint{listed(newer)}: train first")
    log.info("taking step %d of %d%s", step, experiment.training.steps, listed(newer))
    return checkpoints, step, newer


def load_trained_run(workdir: pathlib.Path) -> TrainedRun:
    """Reads the newest intact checkpoint in a workdir, and the frozen parts from their
    folders.

    Raises: UserError where there is no intact checkpoint, or frozen parts have changed since.
    """
    experiment = read_experiment(workdir)
    # Not the run's mesh but all devices here: a checkpoint can be read on any number of them.
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    with jax.set_mesh(mesh):
        setup = make_setup(experiment, mesh)
        checkpoints, step, newer = open_newest(workdir, experiment)
        state = checkpoints.restore(step, setup.state)
        frozen, digests = load_frozen(experiment, setup.frozen)
        require_same_pretrained(checkpoints.extra(step)["pretrained"], digests, workdir)
    return TrainedRun(workdir, experiment, mesh, setup, step, newer, state.trainable, frozen)


def load_exported_run(folder: pathlib.Path, parts: Mapping[str, str] | None = None) -> TrainedRun:
    """Reads the run that an export came from: its config, and the exported parameters. parts:
    folders of the parts that the export does not contain, as `interop.weight_sources` takes.

    Raises: UserError where the folder is no export of a run.
    """
    model = open_model(folder, parts)
    if not (folder / "experiment.json").is_file():
        raise errors.UserError(
            f"{folder} does not say which run it came from (experiment.json): name an export of"
            " launch.export"
        )
    document = json.loads((folder / "experiment.json").read_text())
    experiment = configuring.from_json(Experiment, document)
    # In an export, LoRA updates are already merged, and int8 weights are floats again.
    training = dataclasses.replace(experiment.training, lora=LoRAConfig())
    experiment = dataclasses.replace(experiment, training=training)
    if training.frozen_dtype == "int8":
        experiment = in_floats(experiment)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    with jax.set_mesh(mesh):
        setup = make_setup(experiment, mesh)
        read = model.read(setup.trainable | setup.frozen)
    return TrainedRun(
        folder,
        experiment,
        mesh,
        setup,
        experiment.training.steps,
        {},
        {name: read[name] for name in setup.trainable},
        {name: read[name] for name in setup.frozen},
    )


def in_floats(experiment: Experiment) -> Experiment:
    """Returns the experiment with frozen parts of float dtype."""
    training = dataclasses.replace(experiment.training, frozen_dtype="compute_dtype")
    return dataclasses.replace(experiment, training=training)


def listed(newer: Mapping[int, str]) -> str:
    """Formats the newer checkpoints that were not used, for messages."""
    return "".join(f"; not step {step}: {why}" for step, why in sorted(newer.items()))
