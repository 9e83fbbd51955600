"""Exports the newest intact checkpoint of a run: from its files and those of the frozen parts to
the export's, a piece at a time.
"""

import json
import logging
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax

from flamingo_jax import configuring, paths
from flamingo_jax.checkpointing import manifest
from flamingo_jax.checkpointing.checkpoints import Checkpoints
from flamingo_jax.checkpointing.export import PartReference, export_model, require_free
from flamingo_jax.checkpointing.streaming import (
    HashingReader,
    StreamedTensor,
    TensorStream,
    stream_arrays,
)
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment, MeshConfig
from flamingo_jax.interop.exported_model import merge_updates
from flamingo_jax.interop.weight_sources import (
    ExportedPart,
    WeightSource,
    open_source,
    stream_part,
    within,
)
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.tasks import stages
from flamingo_jax.training.pretrained import (
    in_stored_dtypes,
    random_parameters,
    require_same_pretrained,
)
from flamingo_jax.training.run_card import run_card
from flamingo_jax.training.setup import TrainSetup, make_setup
from flamingo_jax.training.trained_run import (
    in_floats,
    listed,
    open_newest,
    read_experiment,
    run_tokenizer,
)
from flamingo_jax.weight_parts import weight_name

log = logging.getLogger(__name__)


class _FrozenPart(NamedTuple):
    """A frozen part of a run: where its weights are, and {name: shape, dtype and sharding} of
    those of its parameters that the run has, as its folder stores them.
    """

    part: stages.PretrainedPart
    source: WeightSource | None
    """None for random weights."""
    parameters: dict[str, jax.ShapeDtypeStruct]
    digest: str
    """As the checkpoint names it."""
    dtype: str = ""
    """Of its parameters in training; "" for the one in its folder."""


def export_run(workdir: pathlib.Path, output: pathlib.Path, *, trained_only: bool = False) -> None:
    """Exports the model of the run in a workdir to one folder.

    Host memory holds a piece of a parameter at a time, or one layer of it where its layout or
    a low-rank update needs that; moments are not read. A killed export is continued.

    Frozen parts that were trained on as int8 are exported as they are in their folders, in
    their dtypes there: the export is as good as its source, and loaded with
    frozen_dtype="int8" it has the very integers that the run was trained on, since these are
    computed from the same values. Low-rank updates are added to these floats as well.

    Args:
      trained_only: leave the frozen parts out, and name their folders and digests; low-rank
        updates are then exported as they are.

    Raises: UserError where there is no intact checkpoint, a frozen part has changed since,
      `output` exists, or with `trained_only` where nothing is frozen or it is random.
    """
    require_free(output)
    experiment = read_experiment(workdir)
    from_folders = experiment.training.frozen_dtype == "int8"
    if from_folders:
        experiment = in_floats(experiment)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    with jax.set_mesh(mesh):
        setup = make_setup(experiment, mesh)
        checkpoints, step, newer = open_newest(workdir, experiment, parameters_only=True)
        saved = checkpoints.extra(step)["pretrained"]
        if from_folders:
            arrays, dtype = in_stored_dtypes(experiment, setup.frozen), ""
        else:
            arrays, dtype = setup.frozen, stages.frozen_dtype(experiment)
        frozen = _open_frozen(experiment, arrays, saved, workdir, dtype)
        references = _references(frozen, workdir) if trained_only else {}
        stream = _stream(experiment, setup, frozen, checkpoints, step, workdir, trained_only)
        export_model(
            output,
            kind=stages.MODEL_FIELD[experiment.task],
            config=configuring.to_json(stages.model_config(experiment)),
            parameters=stream,
            tokenizer_file=run_tokenizer(workdir),
            extra_files={
                "metrics.jsonl": workdir / "metrics.jsonl",
                "experiment.json": workdir / "config.json",
            },
            card=run_card(experiment, setup, workdir, step, saved, trained_only=trained_only),
            parts=references,
            lora=configuring.to_json(experiment.training.lora) if references else None,
        )
        checkpoints.close()
    log.info("exported step %d of %s to %s%s", step, workdir, output, listed(newer))


def _open_frozen(
    experiment: Experiment,
    frozen: Mapping[str, jax.ShapeDtypeStruct],
    saved: Mapping[str, Mapping[str, str]],
    workdir: pathlib.Path,
    dtype: str,
) -> list[_FrozenPart]:
    """Opens the frozen parts of a run. saved: what its checkpoint says of them. dtype: that of
    their parameters in training, "" for the ones in their folders.

    Raises: UserError for a part that is not the one the run was trained on, as far as that is
      known without reading its weights.
    """
    found: list[_FrozenPart] = []
    for part in stages.frozen_parts(experiment):
        arrays = within(part, frozen)
        digest = saved.get(part.name, {}).get("digest", "")
        if part.folder == "random":
            found.append(_FrozenPart(part, None, arrays, digest))
            continue
        source = open_source(part)
        if isinstance(source, ExportedPart):
            now = {part.name: {"folder": part.folder, "digest": source.digest()}}
            require_same_pretrained(saved, now, workdir)
        # A matrix with a low-rank update has the update's name removed.
        parameters = {weight_name(name): like for name, like in arrays.items()}
        found.append(_FrozenPart(part, source, parameters, digest, dtype))
    return found


def _references(frozen: list[_FrozenPart], workdir: pathlib.Path) -> dict[str, PartReference]:
    """Names the frozen parts by folder and digest.

    Raises: UserError where there is none, or one is random.
    """
    if not frozen:
        raise UserError(
            f"--trained_only: the run in {workdir} has no frozen part, all of its model was"
            " trained: leave the flag out"
        )
    found: dict[str, PartReference] = {}
    for part, source, _, digest, dtype in frozen:
        name = part.name or "language_model"
        if source is None:
            raise UserError(
                f"--trained_only: the {name.replace('_', ' ')} of the run in {workdir} is random"
                " and in no folder: leave the flag out"
            )
        folder = paths.as_path(part.folder).absolute()
        found[name] = PartReference(str(folder), digest, dtype)
    return found


def _stream(
    experiment: Experiment,
    setup: TrainSetup,
    frozen: list[_FrozenPart],
    checkpoints: Checkpoints,
    step: int,
    workdir: pathlib.Path,
    trained_only: bool,
) -> TensorStream:
    """Describes all tensors of the export, in the order in which they are read."""
    saved = checkpoints.extra(step)["pretrained"]
    trained = checkpoints.parameters(step, setup.trainable)
    kept: list[StreamedTensor] = []
    for part, source, parameters, *_ in frozen:
        if source is None:
            made = random_parameters(experiment, parameters)
            kept += stream_arrays({weight_name(name): made[name] for name in made}).tensors
            continue
        wanted = parameters
        if trained_only:
            # What was changed to fit the run is in no folder, so it is exported.
            prefix, shapes = f"{part.name}/" if part.name else "", source.shapes
            wanted = {
                name: like
                for name, like in parameters.items()
                if shapes.get(name.removeprefix(prefix)) != like.shape
            }
        kept += stream_part(source, part, wanted)
    tensors = [*trained, *kept]
    lora = experiment.training.lora
    if lora.rank and not trained_only:
        tensors = merge_updates(tensors, lora.alpha / lora.rank)

    def check(reader: HashingReader) -> None:
        now = {
            part.name: {"folder": part.folder, "digest": source.check(reader)}
            for part, source, *_ in frozen
            if source is not None and not trained_only
        }
        require_same_pretrained(saved, now, workdir)

    folder = workdir / "checkpoints" / str(step)
    identity = [str(workdir), step, manifest.read_manifest(folder).digest, saved, trained_only]
    return TensorStream(tensors, json.dumps(identity, sort_keys=True), check)
