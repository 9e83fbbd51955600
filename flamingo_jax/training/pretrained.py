"""Loads a run's pretrained weights: from exports of earlier stages or from published models.

A frozen part is read from its folder at every start; a trained part may be initialised from
one. A checkpoint does not contain frozen weights, only their folder's digest.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from flamingo_jax.distributed.process_group import ProcessGroup
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.interop.weight_sources import WeightSource, open_source, read_part, within
from flamingo_jax.tasks import stages
from flamingo_jax.training.state import Parameters, split_model
from flamingo_jax.weight_parts import stored_name


def load_frozen(
    experiment: Experiment,
    frozen: Mapping[str, jax.ShapeDtypeStruct],
    process_group: ProcessGroup | None = None,
) -> tuple[Parameters, dict[str, dict[str, str]]]:
    """Reads the frozen parameters from their folders onto the devices.

    Their bytes are verified once for all processes of the run, and each is read by as few
    processes as possible.

    Args:
      frozen: shapes, dtypes and shardings of the frozen parameters (`TrainSetup.frozen`).
      process_group: the run's processes; by default a single one.

    Returns: the parameters, and {part: {"folder", "digest"}}, which a checkpoint stores and
      `require_same_pretrained` compares.
    """
    parameters: Parameters = {}
    digests: dict[str, dict[str, str]] = {}
    for part in stages.frozen_parts(experiment):
        if part.folder == "random":
            parameters |= random_parameters(experiment, within(part, frozen))
            digests[part.name] = {"folder": "random", "digest": f"seed {experiment.seed}"}
            continue
        source = open_source(part)
        parameters |= read_part(source, part, frozen, process_group)
        digests[part.name] = {"folder": part.folder, "digest": source.digest(process_group)}
    return parameters, digests


def in_stored_dtypes(
    experiment: Experiment, frozen: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Gives frozen parameters (`TrainSetup.frozen`, without int8 weights) the dtypes that they
    have in their folders; those that are random keep theirs.
    """
    found = dict(frozen)
    for part in stages.frozen_parts(experiment):
        if part.folder != "random":
            dtypes = open_source(part).dtypes
            for name, like in within(part, frozen).items():
                stored = stored_name(name.removeprefix(f"{part.name}/"))
                found[name] = jax.ShapeDtypeStruct(
                    like.shape, dtypes[stored], sharding=like.sharding
                )
    return found


def load_warm_started(
    experiment: Experiment,
    trainable: Mapping[str, jax.ShapeDtypeStruct],
    process_group: ProcessGroup | None = None,
) -> Parameters:
    """Reads the trained parameters that start from pretrained weights; else as `load_frozen`."""
    parameters: Parameters = {}
    for part in stages.warm_started_parts(experiment):
        parameters |= read_part(open_source(part), part, trainable, process_group)
    return parameters


def require_same_pretrained(
    saved: Mapping[str, Any], current: Mapping[str, Any], workdir: pathlib.Path
) -> None:
    """Raises UserError where a frozen part has changed since the checkpoint in `workdir` was
    saved. saved, current: as `load_frozen` returns them.
    """
    for name, source in current.items():
        before = saved.get(name, {})
        if before.get("digest") != source["digest"]:
            raise UserError(
                f"the checkpoint in {workdir} was trained on the {name or 'model'} of"
                f" {before.get('folder')} ({before.get('digest')}), but {source['folder']} now"
                f" holds another ({source['digest']}): restore that export or train in a new"
                " workdir"
            )


def open_frozen_sources(experiment: Experiment) -> dict[str, WeightSource]:
    """Opens the folder of every frozen part, except those that are random: {part: source}.

    Raises: UserError where a folder is missing, of another kind, or of another config.
    """
    return {
        part.name: open_source(part)
        for part in stages.frozen_parts(experiment)
        if part.folder != "random"
    }


def random_parameters(
    experiment: Experiment, wanted: dict[str, jax.ShapeDtypeStruct]
) -> Parameters:
    """Initialises frozen parameters randomly, for benchmarks and tests."""

    def make(key: jax.Array) -> Parameters:
        _, parameters = split_model(stages.build_model(experiment, nnx.Rngs(params=key)))
        return {name: parameters[name].astype(s.dtype) for name, s in wanted.items()}

    shardings = {name: s.sharding for name, s in wanted.items()}
    # Another key than that of the trained parameters (`setup.initialise`).
    return jax.jit(make, out_shardings=shardings)(jax.random.key(experiment.seed + 1))
