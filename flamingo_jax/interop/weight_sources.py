"""Opened folders of weights, exports and published models alike, and the reading of a model's
part from one: straight onto the devices, with the dtypes and shardings that the caller names.
Training, inference and the loading of a part alone all read weights through these.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from flamingo_jax import paths
from flamingo_jax.checkpointing.export import open_export
from flamingo_jax.checkpointing.streaming import HashingReader, StreamedTensor, whole
from flamingo_jax.configuring import flatten, from_json, to_json
from flamingo_jax.distributed.process_group import ProcessGroup, SingleProcess
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import LanguageModelConfig, VisionConfig
from flamingo_jax.interop.exported_model import ExportedModel, Parameters, require_digest
from flamingo_jax.interop.folders import ModelPart, is_published_folder, open_folder
from flamingo_jax.interop.quantised import read_quantised
from flamingo_jax.models.vit import resize_positions
from flamingo_jax.pytrees import stacked_name
from flamingo_jax.tasks import stages
from flamingo_jax.tasks.stages import EXPORT_PATHS, FLAMINGO_PATHS
from flamingo_jax.weight_parts import dtype_of, float_name, is_scale, is_update, stored_name

T = TypeVar("T")


class WeightSource(Protocol):
    """An opened folder with a part's weights: a published model (`interop.folders`), or an
    export.
    """

    @property
    def tokenizer_file(self) -> pathlib.Path | None:
        """The tokenizer in the same folder, if any."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the part's parameters, {flat name, layers stacked: shape}."""

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """The dtypes that they have on disk, by the same names."""

    def digest(self, process_group: ProcessGroup | None = None) -> str:
        """Returns a digest of the weights. It may read all of them, once for all processes,
        which must all call it.
        """

    def read(
        self,
        targets: Mapping[str, jax.ShapeDtypeStruct],
        process_group: ProcessGroup | None = None,
        layers: range | None = None,
    ) -> Parameters:
        """Reads the parameters named in `targets`, with their dtypes and shardings.

        layers: only these layers of the stacks in `targets`; by default all.
        """

    def stream(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> list[StreamedTensor]:
        """Describes the parameters named in `targets` for reading one layer at a time, with
        per-layer names, cast to the targets' dtypes.
        """

    def check(self, reader: HashingReader) -> str:
        """Verifies the files that `reader` has read for `stream`; returns the same as
        `digest`. Files that had to be read are not read again.
        """


@dataclasses.dataclass(frozen=True)
class ExportedPart:
    """A `WeightSource` that is a part of an exported model. prefix: of its parameters' names
    there, "" for the whole model.
    """

    model: ExportedModel
    prefix: str

    @property
    def tokenizer_file(self) -> pathlib.Path | None:
        return self.model.tokenizer_file

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._within(self.model.shapes)

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        return self._within(self.model.dtypes)

    def digest(self, process_group: ProcessGroup | None = None) -> str:
        return self.model.export.digest

    def read(
        self,
        targets: Mapping[str, jax.ShapeDtypeStruct],
        process_group: ProcessGroup | None = None,
        layers: range | None = None,
    ) -> Parameters:
        within = {self.prefix + name: target for name, target in targets.items()}
        return self._within(self.model.read(within, process_group, layers))

    def stream(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> list[StreamedTensor]:
        within = {self.prefix + name: target for name, target in targets.items()}
        return [
            tensor._replace(name=tensor.name.removeprefix(self.prefix))
            for tensor in self.model.stream(within)
        ]

    def check(self, reader: HashingReader) -> str:
        return self.model.check(reader)

    def _within(self, values: Mapping[str, T]) -> dict[str, T]:
        """Selects what belongs to the part, under the part's own names."""
        return {
            name.removeprefix(self.prefix): value
            for name, value in values.items()
            if name.startswith(self.prefix)
        }


def declare(
    source: WeightSource,
    model: Mapping[str, jax.ShapeDtypeStruct] | None = None,
    shardings: Mapping[str, NamedSharding] | None = None,
    dtype: DTypeLike | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Describes the parameters of a model that is read from a source, as the targets of
    `read_quantised`.

    Args:
      model: the model's arrays, where some weights are int8; by default those of the source.
      shardings: by name; by default the first local device.
      dtype: by default the ones on disk; integers and scales have their own.
    """
    dtypes = source.dtypes
    shapes = source.shapes if model is None else {name: s.shape for name, s in model.items()}
    return {
        name: jax.ShapeDtypeStruct(
            shape,
            dtype_of(name, dtype or dtypes.get(name)),
            sharding=(shardings or {}).get(name),
        )
        for name, shape in shapes.items()
    }


def open_model(
    folder: str | pathlib.Path, parts: Mapping[str, str | pathlib.Path] | None = None
) -> ExportedModel:
    """Opens an export, and the folders of the frozen parts that it does not contain.

    Args:
      parts: {part: folder} of parts that are elsewhere now than when they were exported.

    Raises: UserError where the folder is no export, a part is missing or another than the
      model was trained on, or `parts` names one that the export does not need.
    """
    export, parts = open_export(folder), parts or {}
    for part in parts:
        if part not in export.parts:
            needs = " and ".join(export.parts) or "no part from elsewhere"
            raise UserError(f"parts names a folder for {part!r}, but {folder} needs {needs}")
    found: dict[str, tuple[str, WeightSource]] = {}
    for part, reference in export.parts.items():
        place = paths.as_path(parts.get(part, reference.folder))
        if not place.is_dir():
            raise UserError(
                f"{folder} needs the {part.replace('_', ' ')} of {place}, which is no folder: name"
                f" the one it is in now, as --parts={part}=FOLDER or parts={{{part!r}: FOLDER}}"
            )
        whole_model = export.kind == part
        config = export.config if whole_model else export.config[FLAMINGO_PATHS[part].config]
        kind = LanguageModelConfig if part == "language_model" else VisionConfig
        described = stages.PretrainedPart(
            part,
            str(place),
            from_json(kind, config, f"the config of {folder}"),
            f"{part}_from",
            EXPORT_PATHS[part] | {"flamingo": FLAMINGO_PATHS[part]},
        )
        source = open_source(described)
        if isinstance(source, ExportedPart):
            require_digest(export, part, source.digest())
        found[part] = ("" if whole_model else f"{part}/", source)
    return ExportedModel(export, found)


def open_source(part: stages.PretrainedPart) -> WeightSource:
    """Opens the folder with a part's weights.

    Raises: UserError where it is missing, of another kind, or its config differs from the
      experiment's.
    """
    if part.field != "flamingo_from" and is_published_folder(part.folder):
        of_text = part.field == "language_model_from"
        kind: ModelPart = "language_model" if of_text else "vision_encoder"
        published = open_folder(part.folder, kind)
        _require_equal(to_json(published.config), to_json(part.config), part)
        return published
    model = open_model(part.folder)
    export = model.export
    if export.kind not in part.export_paths:
        raise UserError(
            f"{part.folder} holds a {export.kind} export, but config.{part.field} needs one of"
            f" kind {' or '.join(part.export_paths)}"
        )
    path = part.export_paths[export.kind]
    theirs: Any = export.config[path.config] if path.config else export.config
    # An export of an earlier version lacks newer config keys, whose defaults are the behaviour
    # it was trained with.
    theirs = to_json(from_json(type(part.config), theirs, f"the config of {part.folder}"))
    _require_equal(theirs, to_json(part.config), part)
    return ExportedPart(model, path.prefix)


def read_part(
    source: WeightSource,
    part: stages.PretrainedPart,
    parameters: Mapping[str, jax.ShapeDtypeStruct],
    process_group: ProcessGroup | None = None,
) -> Parameters:
    """Reads those of the model's `parameters` that belong to the part, with their dtypes and
    shardings. LoRA updates are in no folder; they are initialised anew.

    Raises: UserError where the folder lacks one, or has it in another shape.
    """
    names, stored = _targets(source, part, parameters)
    return {
        names[name]: _fitted(value, parameters[names[name]])
        for name, value in read_quantised(source, stored, process_group or SingleProcess()).items()
    }


def stream_part(
    source: WeightSource,
    part: stages.PretrainedPart,
    parameters: Mapping[str, jax.ShapeDtypeStruct],
) -> list[StreamedTensor]:
    """Describes what `read_part` reads for reading one layer at a time, with the per-layer
    names of the model.

    Raises: as `read_part`.
    """
    names, stored = _targets(source, part, parameters)
    found: list[StreamedTensor] = []
    for tensor in source.stream(stored):
        name = stacked_name(tensor.name)[0]
        target = parameters[names[name]]
        if stored[name].shape != target.shape:

            def pieces(
                reader: HashingReader,
                tensor: StreamedTensor = tensor,
                target: jax.ShapeDtypeStruct = target,
            ) -> Iterator[np.ndarray]:
                yield np.asarray(_fitted(jnp.asarray(whole(tensor, reader)), target))

            tensor = tensor._replace(shape=target.shape, dtype=target.dtype, pieces=pieces)
        found.append(tensor._replace(name=_prefix(part.name) + tensor.name))
    return found


def _targets(
    source: WeightSource,
    part: stages.PretrainedPart,
    parameters: Mapping[str, jax.ShapeDtypeStruct],
) -> tuple[dict[str, str], dict[str, jax.ShapeDtypeStruct]]:
    """Finds a part's parameters in its source: {name there: name in the model}, and their
    targets there. Raises UserError where the source lacks one, or has it in another shape.
    """
    prefix = _prefix(part.name)
    names = {
        stored_name(name.removeprefix(prefix)): name
        for name in within(part, parameters)
        if not is_update(name)
    }
    targets = {name: parameters[names[name]] for name in names}
    shapes = source.shapes
    missing = sorted(set(map(float_name, targets)) - set(shapes))
    if missing:
        raise UserError(
            f"{part.folder} lacks {len(missing)} parameters of the {part.name or 'model'},"
            f" {prefix}{missing[0]} first: export that stage again"
        )
    stored = {
        name: target
        if is_scale(name)
        else _as_stored(prefix + name, target, shapes[float_name(name)], part.folder)
        for name, target in targets.items()
    }
    return names, stored


def within(
    part: stages.PretrainedPart, parameters: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Selects the parameters of a part by the prefix of their names."""
    return {name: s for name, s in parameters.items() if name.startswith(_prefix(part.name))}


def _prefix(part: str) -> str:
    return part + "/" if part else ""


def _as_stored(
    name: str, target: jax.ShapeDtypeStruct, shape: tuple[int, ...], folder: str
) -> jax.ShapeDtypeStruct:
    """Returns the target with the shape that is stored. Only a ViT's position embeddings may
    differ from the target's, which `_fitted` interpolates to another image size.
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
    """Interpolates a ViT's position embeddings to the target's grid, as its forward pass does;
    returns all others as they are.
    """
    if value.shape == target.shape:
        return value
    rows, columns = target.shape[:2]
    resized = jax.jit(
        lambda v: resize_positions(v, rows, columns).astype(target.dtype),
        out_shardings=target.sharding,
    )
    return resized(value)


def _require_equal(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], part: stages.PretrainedPart
) -> None:
    """Raises UserError for a field of the part's config that differs between folder and
    experiment, unless it is one of `FREE`.
    """
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
"""Config fields that may differ from an export's: image sizes can change between stages, and
initialisation no longer matters. All others determine how the weights are used.
"""
