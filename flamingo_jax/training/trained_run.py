"""Loads the newest intact checkpoint of a run, without changing its workdir, and exports it."""

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
from flamingo_jax.checkpointing.export import export_model, open_export
from flamingo_jax.experiment import Experiment, LoRAConfig, MeshConfig
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.processing.tokenizer import FILE_NAME, tokenizer_file
from flamingo_jax.tasks import stages
from flamingo_jax.training.pretrained import (
    in_stored_dtypes,
    load_frozen,
    require_same_pretrained,
)
from flamingo_jax.training.setup import TrainSetup, make_setup
from flamingo_jax.training.state import Parameters, dense_parameters

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
        return tokenizer_file(self.workdir) or self.workdir / FILE_NAME


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


def load_trained_run(workdir: pathlib.Path, *, original: bool = False) -> TrainedRun:
    """Reads the newest intact checkpoint in a workdir, and the frozen parts from their
    folders.

    original: read int8 parts as the floats that are in their folders.

    Raises: UserError where there is no intact checkpoint, or frozen parts have changed since.
    """
    experiment = read_experiment(workdir)
    floats = original and experiment.training.frozen_dtype == "int8"
    if floats:
        experiment = _in_floats(experiment)
    # Not the run's mesh but all devices here: a checkpoint can be read on any number of them.
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    with jax.set_mesh(mesh):
        setup = make_setup(experiment, mesh)
        checkpoints = Checkpoints(
            workdir / "checkpoints",
            keep_last=experiment.training.keep_last,
            keep_every=experiment.training.keep_every,
        )
        step, newer = checkpoints.newest()
        if step is None:
            raise errors.UserError(
                f"{workdir} has no whole checkpoint{_listed(newer)}: train first"
            )
        log.info("taking step %d of %d%s", step, experiment.training.steps, _listed(newer))
        state = checkpoints.restore(step, setup.state)
        targets = in_stored_dtypes(experiment, setup.frozen) if floats else setup.frozen
        frozen, digests = load_frozen(experiment, targets)
        require_same_pretrained(checkpoints.extra(step)["pretrained"], digests, workdir)
    return TrainedRun(workdir, experiment, mesh, setup, step, newer, state.trainable, frozen)


def load_exported_run(folder: pathlib.Path) -> TrainedRun:
    """Reads the run that an export came from: its config, and the exported parameters.

    Raises: UserError where the folder is no export of a run.
    """
    export = open_export(folder)
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
        experiment = _in_floats(experiment)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    with jax.set_mesh(mesh):
        setup = make_setup(experiment, mesh)
        export.verify()
        read = export.read_sharded(setup.trainable | setup.frozen)
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


def _in_floats(experiment: Experiment) -> Experiment:
    """Returns the experiment with frozen parts of float dtype."""
    training = dataclasses.replace(experiment.training, frozen_dtype="compute_dtype")
    return dataclasses.replace(experiment, training=training)


def export_run(workdir: pathlib.Path, output: pathlib.Path) -> None:
    """Exports the model of the run in a workdir to one self-contained folder.

    Frozen parts that were trained on as int8 are exported as they are in their folders, in
    their dtypes there: the export is as good as its source, and loaded with
    frozen_dtype="int8" it has the very integers that the run was trained on, since these are
    computed from the same values. Low-rank updates are added to these floats as well.

    Raises: as `load_trained_run`; UserError where `output` already exists.
    """
    run = load_trained_run(workdir, original=True)
    export_model(
        output,
        kind=stages.MODEL_FIELD[run.experiment.task],
        config=configuring.to_json(stages.model_config(run.experiment)),
        parameters=dense_parameters(run.setup.graph, run.trainable | run.frozen),
        tokenizer_file=run.tokenizer_file,
        extra_files={
            "metrics.jsonl": workdir / "metrics.jsonl",
            "experiment.json": workdir / "config.json",
        },
    )
    log.info("exported step %d of %s to %s%s", run.step, workdir, output, _listed(run.newer))


def _listed(newer: Mapping[int, str]) -> str:
    """Formats the newer checkpoints that were not used, for messages."""
    return "".join(f"; not step {step}: {why}" for step, why in sorted(newer.items()))
