"""Where a run's weights come from: exports of earlier stages, published models, or nowhere.

A frozen part is read from its folder; a trained one may start from there. A checkpoint holds
neither the frozen weights nor a copy of them, only the folder's digest.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from flamingo_jax.checkpointing.export import Export, open_export
from flamingo_jax.configuring import flatten, from_json, to_json
from flamingo_jax.distributed.process_group import ProcessGroup, SingleProcess
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.interop.folders import ModelPart, is_published_folder, open_folder
from flamingo_jax.models.vit import resize_positions
from flamingo_jax.tasks import stages
from flamingo_jax.training.state import Parameters, split_model
from flamingo_jax.weight_parts import is_update, stored_name


class WeightSource(Protocol):
    """Reads a part's weights from the folder they come from, which is open: a published model
    (`interop.folders`), or a part of an export.
    """

    @property
    def tokenizer_file(self) -> pathlib.Path | None:
        """The tokenizer that lies beside the weights, if any."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{Flat stacked name within the part: shape} of its parameters."""

    def digest(self, process_group: ProcessGroup | None = None) -> str:
        """Names the weights; may read all of them, once for all processes, which all ask."""

    def read(
        self,
        targets: Mapping[str, jax.ShapeDtypeStruct],
        process_group: ProcessGroup | None = None,
    ) -> Parameters:
        """Reads the parameters of these names, with the types and shardings of `targets`."""


@dataclasses.dataclass(frozen=True)
class ExportedPart:
    """Reads a part of an export, a `WeightSource`. prefix: of its parameters' names there."""

    export: Export
    prefix: str

    @property
    def tokenizer_file(self) -> pathlib.Path | None:
        return self.export.tokenizer_file

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name.removeprefix(self.prefix): shape
            for name, shape in self.export.shapes.items()
            if name.startswith(self.prefix)
        }

    def digest(self, process_group: ProcessGroup | None = None) -> str:
        return self.export.digest

    def read(
        self,
        targets: Mapping[str, jax.ShapeDtypeStruct],
        process_group: ProcessGroup | None = None,
    ) -> Parameters:
        self.export.verify(process_group)
        within = {self.prefix + name: target for name, target in targets.items()}
        found = self.export.read_sharded(within, process_group)
        return {name.removeprefix(self.prefix): value for name, value in found.items()}


def load_frozen(
    experiment: Experiment,
    frozen: Mapping[str, jax.ShapeDtypeStruct],
    process_group: ProcessGroup | None = None,
) -> tuple[Parameters, dict[str, dict[str, str]]]:
    """Reads the frozen parameters from the folders they come from to where they lie.

    Their bytes are checked once for all processes of the run, and each is read by as few as may
    be.

    Args:
      frozen: the model's frozen parameters (`TrainSetup.frozen`).
      process_group: the run's processes; by default this one is alone.

    Returns: the parameters, and {part: {"folder", "digest"}} to hold a checkpoint to.
    """
    parameters: Parameters = {}
    digests: dict[str, dict[str, str]] = {}
    for part in stages.frozen_parts(experiment):
        if part.folder == "random":
            parameters |= _random_parameters(experiment, _within(part, frozen))
            digests[part.name] = {"folder": "random", "digest": f"seed {experiment.seed}"}
            continue
        source = open_source(part)
        parameters |= read_part(source, part, frozen, process_group)
        digests[part.name] = {"folder": part.folder, "digest": source.digest(process_group)}
    return parameters, digests


def load_warm_started(
    experiment: Experiment,
    trainable: Mapping[str, jax.ShapeDtypeStruct],
    process_group: ProcessGroup | None = None,
) -> Parameters:
    """Reads those trained parameters that do not start at random; as `load_frozen`."""
    parameters: Parameters = {}
    for part in stages.warm_started_parts(experiment):
        parameters |= read_part(open_source(part), part, trainable, process_group)
    return parameters


def require_same_pretrained(
    saved: dict[str, Any], current: dict[str, Any], workdir: pathlib.Path
) -> None:
    """Raises UserError where a frozen part is another one now than when a checkpoint of
    `workdir` was saved; both as `load_frozen` returns them.
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
    """Opens the folder of every frozen part, by part, those that are random left out.

    Raises UserError where one is missing, foreign or of another config.
    """
    return {
        part.name: open_source(part)
        for part in stages.frozen_parts(experiment)
        if part.folder != "random"
    }


def open_source(part: stages.PretrainedPart) -> WeightSource:
    """Opens the folder that a part comes from.

    Raises: UserError where it is missing, of another kind, or its config is not the one here.
    """
    if part.field != "flamingo_from" and is_published_folder(part.folder):
        of_text = part.field == "language_model_from"
        kind: ModelPart = "language_model" if of_text else "vision_encoder"
        published = open_folder(part.folder, kind)
        _require_equal(to_json(published.config), to_json(part.config), part)
        return published
    export = open_export(part.folder)
    if export.kind not in part.export_paths:
        raise UserError(
            f"{part.folder} holds a {export.kind} export, but config.{part.field} needs one of"
            f" kind {' or '.join(part.export_paths)}"
        )
    path = part.export_paths[export.kind]
    theirs: Any = export.config[path.config] if path.config else export.config
    # An export of an earlier version lacks the keys that came since: their defaults are what it
    # was.
    theirs = to_json(from_json(type(part.config), theirs, f"the config of {part.folder}"))
    _require_equal(theirs, to_json(part.config), part)
    return ExportedPart(export, _prefix(path.parameters))


def read_part(
    source: WeightSource,
    part: stages.PretrainedPart,
    parameters: Mapping[str, jax.ShapeDtypeStruct],
    process_group: ProcessGroup | None = None,
) -> Parameters:
    """Reads those of a model's parameters that are the part's, to where they shall lie. Low-rank
    updates are in no folder: they start anew.
    """
    prefix = _prefix(part.name)
    names = {
        stored_name(name.removeprefix(prefix)): name
        for name in _within(part, parameters)
        if not is_update(name)
    }
    targets = {name: parameters[names[name]] for name in names}
    shapes = source.shapes
    missing = sorted(set(targets) - set(shapes))
    if missing:
        raise UserError(
            f"{part.folder} lacks {len(missing)} parameters of the {part.name or 'model'},"
            f" {prefix}{missing[0]} first: export that stage again"
        )
    stored = {
        name: _as_stored(prefix + name, target, shapes[name], part.folder)
        for name, target in targets.items()
    }
    return {
        names[name]: _fitted(value, targets[name])
        for name, value in source.read(stored, process_group or SingleProcess()).items()
    }


def _within(
    part: stages.PretrainedPart, parameters: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: s for name, s in parameters.items() if name.startswith(_prefix(part.name))}


def _prefix(part: str) -> str:
    return part + "/" if part else ""


def _as_stored(
    name: str, target: jax.ShapeDtypeStruct, shape: tuple[int, ...], folder: str
) -> jax.ShapeDtypeStruct:
    """Returns the target in its stored shape, which may be another for a ViT's positions: those
    of another image size are interpolated.
    """
    if shape == target.shape:
        return target
    if name != "vision_encoder/position_embedding" or shape[-1] != target.shape[-1]:
        raise UserError(
            f"{folder}: {name} is {shape}, but this config makes it {target.shape}: make"
            " config.flamingo that of the folder"
        )
    assert isinstance(target.sharding, NamedSharding)
    return jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(target.sharding.mesh, PartitionSpec())
    )


def _fitted(value: jax.Array, target: jax.ShapeDtypeStruct) -> jax.Array:
    """Interpolates a ViT's positions to another size, as its own forward does; returns all else
    as it is.
    """
    if value.shape == target.shape:
        return value
    rows, columns = target.shape[:2]
    resized = jax.jit(
        lambda v: resize_positions(v, rows, columns).astype(target.dtype),
        out_shardings=target.sharding,
    )
    return resized(value)


def _random_parameters(
    experiment: Experiment, wanted: dict[str, jax.ShapeDtypeStruct]
) -> Parameters:
    def make(key: jax.Array) -> Parameters:
        _, parameters = split_model(stages.build_model(experiment, nnx.Rngs(params=key)))
        return {name: parameters[name].astype(s.dtype) for name, s in wanted.items()}

    shardings = {name: s.sharding for name, s in wanted.items()}
    return jax.jit(make, out_shardings=shardings)(jax.random.key(experiment.seed + 1))


def _require_equal(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], part: stages.PretrainedPart
) -> None:
    prefix = part.name or "model"
    before, now = flatten(theirs, prefix), flatten(ours, prefix)
    for key in sorted({*before, *now}):
        if key.split(".")[-1] not in FREE and before.get(key) != now.get(key):
            name = key.removeprefix(f"{prefix}.")
            raise UserError(
                f"{part.folder} was trained with {name} = {before.get(key)!r}, but this config's"
                f" {prefix} has {now.get(key)!r}: make them equal"
            )


FREE = ("image_size", "image_fit", "stochastic_depth", "gate_init", "out_scale", "bias_init")
"""What may be another than in an export: an image may have another size and form in training
and in use, and a start is behind it; everything else is part of the weights' meaning.
"""
