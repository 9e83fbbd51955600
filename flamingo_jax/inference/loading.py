"""An exported folder as a model ready to use."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from flamingo_jax.checkpointing.export import Export, open_export
from flamingo_jax.configuring import from_json
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import FlamingoConfig
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.pytrees import from_flat, to_flat


@dataclasses.dataclass(frozen=True)
class LoadedFlamingo:
    """A Flamingo with its tokenizer.

    `digest` names the exported weights; "" for a model made in memory.
    """

    model: Flamingo
    tokenizer: Tokenizer
    config: FlamingoConfig
    digest: str = ""


def load_flamingo(
    folder: str | pathlib.Path, dtype: DTypeLike | None = None, *, mesh: Mesh | None = None
) -> LoadedFlamingo:
    """Loads the model of an exported folder, which is all it needs. Weights keep their stored
    types and are cast at use.

    Args:
      dtype: compute type; by default float32 on CPU and bfloat16 on accelerators.
      mesh: whose devices all hold the whole model; by default the first local device.

    Raises:
      UserError: no export, one of another kind, or parameters that are missing, foreign or of
        another shape.
    """
    export = _open(folder)
    config = from_json(FlamingoConfig, export.config)
    if export.tokenizer_file is None:
        raise UserError(f"{folder} holds no tokenizer: export the stage again with its tokenizer")
    tokenizer = Tokenizer.load(export.tokenizer_file, config.language_model.vocab_size)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    abstract = nnx.eval_shape(lambda: Flamingo(config, rngs=nnx.Rngs(0), dtype=dtype))
    graph, shapes = nnx.split(abstract)
    export.verify()
    _check(str(folder), to_flat(shapes), export.shapes)
    dtypes = export.dtypes
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    targets = {
        name: jax.ShapeDtypeStruct(shape, dtypes[name], sharding=sharding)
        for name, shape in export.shapes.items()
    }
    state = nnx.State(from_flat(export.read_sharded(targets)))
    return LoadedFlamingo(nnx.merge(graph, state), tokenizer, config, export.digest)


def flamingo_config(folder: str | pathlib.Path) -> FlamingoConfig:
    """Reads the config alone of an exported Flamingo. Raises UserError for what is none."""
    return from_json(FlamingoConfig, _open(folder).config)


def _open(folder: str | pathlib.Path) -> Export:
    export = open_export(folder)
    if export.kind != "flamingo":
        raise UserError(
            f"{folder} holds a {export.kind} export, but a Flamingo is needed: name the folder"
            " exported from its Flamingo stage"
        )
    return export


def _check(folder: str, wanted: dict[str, Any], found: dict[str, tuple[int, ...]]) -> None:
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
