"""Loads an exported Flamingo, with its tokenizer and config."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flamingo_jax.checkpointing.export import Export, open_export
from flamingo_jax.configuring import from_json
from flamingo_jax.distributed.process_group import ProcessGroup
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import FlamingoConfig
from flamingo_jax.inference.placement import check_mesh, parameter_shardings
from flamingo_jax.interop.exported_model import ExportedModel
from flamingo_jax.interop.quantised import read_quantised
from flamingo_jax.interop.weight_sources import ExportedPart, declare, open_model
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.models.quantised import quantise_part
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.pytrees import from_flat, to_flat
from flamingo_jax.tasks.stages import PARTS
from flamingo_jax.weight_parts import float_name, is_scale

FROZEN_DTYPES = ("float32", "bfloat16", "int8")
"""The dtypes that the frozen parts can be loaded in."""


@dataclasses.dataclass(frozen=True)
class LoadedFlamingo:
    """A Flamingo with its tokenizer and config.

    digest: of the exported weights; "" for a model made in memory.
    """

    model: Flamingo
    tokenizer: Tokenizer
    config: FlamingoConfig
    digest: str = ""


def open_flamingo(
    folder: str | pathlib.Path, parts: Mapping[str, str | pathlib.Path] | None = None
) -> tuple[FlamingoConfig, Tokenizer, str]:
    """Returns an exported model's config, tokenizer and digest, without reading its parameters.

    Raises: UserError as `load_flamingo` does for the folder.
    """
    model, config, tokenizer = _open(folder, parts)
    return config, tokenizer, model.export.digest


def _open(
    folder: str | pathlib.Path, parts: Mapping[str, str | pathlib.Path] | None
) -> tuple[ExportedModel, FlamingoConfig, Tokenizer]:
    model = open_model(folder, parts)
    export = _flamingo(model.export)
    config = from_json(FlamingoConfig, export.config)
    if export.tokenizer_file is None:
        raise UserError(f"{folder} holds no tokenizer: export the stage again with its tokenizer")
    tokenizer = Tokenizer.load(export.tokenizer_file, config.language_model.vocab_size)
    return model, config, tokenizer


def load_flamingo(
    folder: str | pathlib.Path,
    dtype: DTypeLike | None = None,
    *,
    frozen_dtype: str | None = None,
    mesh: Mesh | None = None,
    process_group: ProcessGroup | None = None,
    parts: Mapping[str, str | pathlib.Path] | None = None,
) -> LoadedFlamingo:
    """Loads the model of an exported folder. Weights keep their stored dtypes and are cast
    where they are used.

    On a mesh every parameter is read straight into its shards, as `placement` lays them out:
    no process and no device ever holds more than its own part, beside the one parameter that
    is just being read.

    Args:
      dtype: compute dtype; by default float32 on CPU and bfloat16 on accelerators.
      frozen_dtype: one of FROZEN_DTYPES for language model and vision encoder, which are cast
        or quantised as they are read; by default their stored dtypes.
      mesh: of `partitioning.mesh.make_mesh`; by default the first local device.
      process_group: where several processes load together, what they wait for one another
        with; all of them call this.
      parts: {part: folder} of frozen parts that the export names but does not contain, where
        they are elsewhere now ("language_model", "vision_encoder").

    Raises:
      UserError: the folder is no export, or one of another kind; a part that it names is
        missing or another one; parameters are missing, unknown or of another shape; or the
        mesh does not fit the model.
    """
    model, config, tokenizer = _open(folder, parts)
    export = model.export
    if frozen_dtype not in (None, *FROZEN_DTYPES):
        raise UserError(
            f"frozen_dtype is {frozen_dtype!r}, but must be {', '.join(FROZEN_DTYPES[:-1])} or"
            f" {FROZEN_DTYPES[-1]}: choose one, or leave it out for the export's own"
        )
    if mesh is not None:
        check_mesh(config, mesh)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    # Shapes alone: parameters are read from the export, not initialised.
    graph, state = nnx.split(nnx.eval_shape(lambda: build_model(config, dtype, frozen_dtype)))
    source, shapes = ExportedPart(model, ""), to_flat(state)
    _check(str(folder), shapes, source.shapes)
    targets = _as_frozen(declare(source, shapes), frozen_dtype)
    if mesh is not None:
        shardings = parameter_shardings(targets, mesh)
        targets = _as_frozen(declare(source, shapes, shardings), frozen_dtype)
    state = nnx.State(from_flat(read_quantised(source, targets, process_group)))
    return LoadedFlamingo(nnx.merge(graph, state), tokenizer, config, export.digest)


def build_model(config: FlamingoConfig, dtype: DTypeLike, frozen_dtype: str | None) -> Flamingo:
    """Builds a model, with integers in its frozen parts for "int8"; see `load_flamingo`."""
    model = Flamingo(config, rngs=nnx.Rngs(0), dtype=dtype)
    if frozen_dtype == "int8":
        for part in PARTS:
            quantise_part(getattr(model, part))
    return model


def _as_frozen(
    targets: dict[str, jax.ShapeDtypeStruct], frozen_dtype: str | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Gives the frozen parts' targets a float dtype."""
    if frozen_dtype in (None, "int8"):
        return targets
    frozen = tuple(f"{part}/" for part in PARTS)
    return {
        name: jax.ShapeDtypeStruct(like.shape, frozen_dtype, sharding=like.sharding)
        if name.startswith(frozen)
        else like
        for name, like in targets.items()
    }


def flamingo_config(folder: str | pathlib.Path) -> FlamingoConfig:
    """Reads only the config of an exported Flamingo.

    Raises: UserError where the folder is none.
    """
    return from_json(FlamingoConfig, _flamingo(open_export(folder)).config)


def _flamingo(export: Export) -> Export:
    """Returns an export, and raises UserError if it is not of a Flamingo."""
    if export.kind != "flamingo":
        raise UserError(
            f"{export.folder} holds a {export.kind} export, but a Flamingo is needed: name the"
            " folder exported from its Flamingo stage"
        )
    return export


def _check(folder: str, wanted: dict[str, Any], found: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError where the export's parameters are not those of its config."""
    wanted = {float_name(name): like for name, like in wanted.items() if not is_scale(name)}
    missing, foreign = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or foreign:
        name, what = (missing[0], "lacks") if missing else (foreign[0], "has the unknown parameter")
        raise UserError(
            f"{folder} {what} {name} ({len(missing)} missing, {len(foreign)} unknown): export"
            " it again with this version"
        )
    for name, like in wanted.items():
        if found[name] != like.shape:
            raise UserError(
                f"{folder}: {name} is {found[name]}, but its config.json makes it {like.shape}:"
                " the folder is damaged"
            )
