"""The three stages: which model and task each has, and which frozen parts it takes from the stages before it."""

import pathlib
from collections.abc import Collection
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.models.dual_encoder import DualEncoder
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.tasks.contrastive import ContrastiveTask
from flamingo_jax.tasks.flamingo import FlamingoTask
from flamingo_jax.tasks.language_modelling import LanguageModellingTask
from flamingo_jax.tasks.task import Task

MODEL_FIELD = {"contrastive": "contrastive", "language_modelling": "language_model", "flamingo": "flamingo"}
"""Task -> the field of Experiment that declares its model; also the kind of its export."""


SOURCES = {"vision_encoder": {"contrastive": "vision", "vision_encoder": ""}, "language_model": {"language_model": ""}}
"""Frozen part -> the kinds of export that hold it -> where its parameters and its config stand in them, "" for at the top."""


class Base(NamedTuple):
    """A frozen part that comes from an export, or from a published model."""

    part: str
    """Name of the part in this model, also the prefix of its parameters."""
    folder: str
    """Exported or published folder, or "random" for untrained weights (benchmarks, tests)."""
    config: Any
    """The part's configuration here."""


def model_config(experiment: Experiment) -> Any:
    """The configuration of the task's model; a UserError where the config lacks it."""
    field = MODEL_FIELD[experiment.task]
    config = getattr(experiment, field)
    if config is None:
        raise UserError(f"config.{field} is empty, but task {experiment.task!r} trains that model: fill it in")
    return config


def build_model(experiment: Experiment, rngs: nnx.Rngs) -> nnx.Module:
    """The task's model with random parameters."""
    config = model_config(experiment)
    dtype = jnp.dtype(experiment.training.compute_dtype)
    if experiment.task == "contrastive":
        return DualEncoder(config, rngs=rngs, dtype=dtype)
    if experiment.task == "language_modelling":
        return LanguageModel(config, rngs=rngs, dtype=dtype, remat=experiment.training.remat)
    return Flamingo(config, rngs=rngs, dtype=dtype, remat=experiment.training.remat, frames_at_once=experiment.training.frames_at_once)


def make_task(experiment: Experiment) -> Task:
    training = experiment.training
    if experiment.task == "contrastive":
        return ContrastiveTask(model_config(experiment))
    if experiment.task == "language_modelling":
        return LanguageModellingTask(training.loss)
    return FlamingoTask(training.loss, training.use_visuals)


def bases(experiment: Experiment, parts: Collection[str] = ("vision_encoder", "language_model")) -> list[Base]:
    """Those `parts` of the task's model that are frozen and the folders they come from; a UserError where one is not named or not there."""
    if experiment.task != "flamingo":
        return []
    config = model_config(experiment)
    found = [
        Base("vision_encoder", experiment.vision_encoder_from, config.vision),
        Base("language_model", experiment.language_model_from, config.language_model),
    ]
    found = [base for base in found if base.part in parts]
    for base in found:
        stage = next(iter(SOURCES[base.part]))
        if not base.folder:
            raise UserError(
                f"config.{base.part}_from is empty: name the folder exported by the {stage} stage, that of a published model, "
                "or 'random' for untrained weights"
            )
        if base.folder != "random" and not pathlib.Path(base.folder).is_dir():
            raise UserError(
                f"config.{base.part}_from is {base.folder!r}, which is no folder: run the {stage} stage and launch.export first, "
                "or name the folder of a published model"
            )
    return found
