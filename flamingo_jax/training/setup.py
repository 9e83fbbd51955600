"""From an experiment to arrays on devices: model, frozen parts, optimizer and state, sharded
from their first byte.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flamingo_jax.checkpointing.export import open_export
from flamingo_jax.configuring import from_json, to_json
from flamingo_jax.distributed.process_group import ProcessGroup, SingleProcess
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.interop.folders import Part, is_foreign, open_folder
from flamingo_jax.models.vision import vision_encoder
from flamingo_jax.models.vit import resize_positions
from flamingo_jax.partitioning import rules
from flamingo_jax.processing.normalise import normalise
from flamingo_jax.pytrees import from_flat, to_flat
from flamingo_jax.tasks import stages
from flamingo_jax.training.optimizer import make_optimizer, make_schedule
from flamingo_jax.training.state import Parameters, TrainState, initial_state, split_model


class TrainSetup(NamedTuple):
    """What is known about a run before its first step: shapes, shardings and functions."""

    graph: Any
    trainable: dict[str, jax.ShapeDtypeStruct]
    frozen: dict[str, jax.ShapeDtypeStruct]
    optimizer: optax.GradientTransformation
    schedule: Callable[[jax.Array], jax.Array]
    """Update number, from 0 -> learning rate."""
    state: TrainState
    """Shapes and shardings of the state, as ShapeDtypeStructs."""
    gradient_shardings: dict[str, NamedSharding]
    """Where the gradient is summed to: where the moments lie."""


class FrozenEncoder(NamedTuple):
    """The vision encoder as a function of images.

    digest: names weights, image size and type. shape, dtype: those of an image's features,
      [S, C]. encode: uint8 [n, H, W, 3] -> [n, S, C].
    """

    digest: str
    shape: tuple[int, int]
    dtype: np.dtype
    encode: Callable[[np.ndarray], np.ndarray]


class WeightSource(NamedTuple):
    """A folder that weights come from, an export or a published model, opened but not read.

    shapes: of its parameters, by their flat stacked names within the part.
    digest: names the weights; may read all of them, once for all processes, which all ask.
    read: the parameters of these names, with the types and shardings that they are given.
    """

    folder: str
    tokenizer_file: pathlib.Path | None
    shapes: dict[str, tuple[int, ...]]
    digest: Callable[[ProcessGroup], str]
    read: Callable[[dict[str, jax.ShapeDtypeStruct], ProcessGroup], Parameters]


def make_setup(experiment: Experiment, mesh: Mesh) -> TrainSetup:
    """Works out shapes and shardings of everything; allocates nothing on a device."""
    model = nnx.eval_shape(
        lambda: stages.build_model(experiment, nnx.Rngs(params=jax.random.key(0)))
    )
    graph, shapes = split_model(model)
    unfrozen = stages.unfrozen(experiment)
    trainable_names = rules.trainable_names(experiment.task, shapes, unfrozen)
    shardings = rules.shardings(experiment.task, shapes, mesh, unfrozen)
    frozen_dtype = jnp.dtype(experiment.training.compute_dtype)

    def declare(name: str, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shapes[name].shape, dtype, sharding=shardings[name])

    trainable = {name: declare(name, jnp.float32) for name in shapes if name in trainable_names}
    frozen = {name: declare(name, frozen_dtype) for name in shapes if name not in trainable_names}
    optimizer, state = state_shapes(experiment, trainable)
    state = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(
            s.shape, s.dtype, sharding=NamedSharding(mesh, PartitionSpec())
        ),
        state,
    )
    moment_shardings = rules.moment_shardings(trainable)
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state.optimizer,
        moment_shardings,
    )
    schedule = make_schedule(
        experiment.optimizer, experiment.training.steps, updates_per_step(experiment)
    )
    return TrainSetup(
        graph,
        trainable,
        frozen,
        optimizer,
        schedule,
        state._replace(trainable=trainable, optimizer=moments),
        moment_shardings,
    )


def state_shapes(
    experiment: Experiment, trainable: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[optax.GradientTransformation, TrainState]:
    """The optimizer of what is trained, and the shapes of the state that a checkpoint holds."""
    optimizer = make_optimizer(
        experiment.optimizer, experiment.training.steps, trainable, updates_per_step(experiment)
    )
    return optimizer, jax.eval_shape(lambda p: initial_state(p, optimizer, 0), dict(trainable))


def updates_per_step(experiment: Experiment) -> int:
    """How often a step updates the parameters."""
    return len(experiment.data) if experiment.training.mixing == "round_robin" else 1


def initialise(
    experiment: Experiment, setup: TrainSetup, process_group: ProcessGroup | None = None
) -> TrainState:
    """Makes a fresh state on the devices that hold it; frozen parts are not initialised.
    Trained parts that an export has start from it. process_group: as of `load_frozen`.
    """

    def make(key: jax.Array) -> TrainState:
        _, parameters = split_model(stages.build_model(experiment, nnx.Rngs(params=key)))
        return initial_state(
            {name: parameters[name] for name in setup.trainable},
            setup.optimizer,
            experiment.seed,
        )

    shardings = jax.tree.map(lambda s: s.sharding, setup.state)
    found: Parameters = {}
    for part in stages.warm_started_parts(experiment):
        wanted = {
            name: s for name, s in setup.trainable.items() if name.startswith(_prefix(part.name))
        }
        found |= _read_part(_open_source(part), part, wanted, process_group or SingleProcess())
    state = jax.jit(make, out_shardings=shardings)(jax.random.key(experiment.seed))
    return state._replace(trainable=state.trainable | found)


def load_frozen(
    experiment: Experiment, setup: TrainSetup, process_group: ProcessGroup | None = None
) -> tuple[Parameters, dict[str, dict[str, str]]]:
    """Reads the frozen parameters from the folders they come from to where they lie.

    Their bytes are checked once for all processes of the run, and each is read by as few as may
    be.

    process_group: the run's processes; by default this one is alone.

    Returns: the parameters, and {part: {"folder", "digest"}} to hold a checkpoint to.
    """
    process_group = process_group or SingleProcess()
    frozen: Parameters = {}
    digests: dict[str, dict[str, str]] = {}
    for part in stages.frozen_parts(experiment):
        wanted = {
            name: s for name, s in setup.frozen.items() if name.startswith(_prefix(part.name))
        }
        if part.folder == "random":
            frozen |= _random_parameters(experiment, wanted)
            digests[part.name] = {"folder": "random", "digest": f"seed {experiment.seed}"}
            continue
        source = _open_source(part)
        frozen |= _read_part(source, part, wanted, process_group)
        digests[part.name] = {"folder": part.folder, "digest": source.digest(process_group)}
    return frozen, digests


def load_encoder(
    experiment: Experiment, process_group: ProcessGroup | None = None
) -> FrozenEncoder:
    """Loads the frozen vision encoder alone, on this process's devices. process_group: as of
    `load_frozen`.

    Raises: UserError where there is none, or its export does not fit the config.
    """
    process_group = process_group or SingleProcess()
    if experiment.task != "flamingo":
        raise UserError(
            f"training.cache_features is on, but task {experiment.task!r} has no frozen"
            " encoder: turn it off"
        )
    if "vision_encoder" in stages.unfrozen(experiment):
        raise UserError(
            "training.cache_features keeps what a frozen encoder makes, but"
            " training.unfreeze_vision_encoder trains it: turn one of them off"
        )
    config, dtype = (
        stages.model_config(experiment).vision,
        jnp.dtype(experiment.training.compute_dtype),
    )
    (part,) = stages.frozen_parts(experiment, ["vision_encoder"])
    if part.folder == "random":
        raise UserError(
            "training.cache_features needs an encoder that stays: name its export in"
            " config.vision_encoder_from"
        )
    source = _open_source(part)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: vision_encoder(config, rngs=nnx.Rngs(0))))
    mesh, prefix = Mesh(np.asarray(jax.local_devices()), "data"), _prefix(part.name)
    whole = NamedSharding(mesh, PartitionSpec())
    wanted = {
        prefix + name: jax.ShapeDtypeStruct(s.shape, dtype, sharding=whole)
        for name, s in to_flat(shapes).items()
    }
    parameters = {
        name.removeprefix(prefix): value
        for name, value in _read_part(source, part, wanted, process_group).items()
    }

    @functools.partial(jax.jit, in_shardings=(None, NamedSharding(mesh, PartitionSpec("data"))))
    def features(parameters: Parameters, images: jax.Array) -> jax.Array:
        encoder = nnx.merge(graph, nnx.State(from_flat(parameters)))
        grid = encoder(normalise(images, config.mean, config.std, dtype))
        return grid.reshape(grid.shape[0], -1, grid.shape[-1])

    def encode(images: np.ndarray) -> np.ndarray:
        padding = -len(images) % mesh.size
        return np.asarray(features(parameters, np.pad(images, ((0, padding), *[(0, 0)] * 3))))[
            : len(images)
        ]

    image = jax.ShapeDtypeStruct((mesh.size, config.image_size, config.image_size, 3), jnp.uint8)
    _, cells, channels = jax.eval_shape(features, parameters, image).shape
    fit = "" if config.image_fit == "pad" else f"_{config.image_fit}"
    name = f"{source.digest(process_group)[:16]}_{config.image_size}{fit}_{dtype.name}"
    return FrozenEncoder(name, (cells, channels), np.dtype(dtype), encode)


def require_same_pretrained(
    saved: dict[str, Any], current: dict[str, Any], workdir: pathlib.Path
) -> None:
    """A UserError where a frozen part is another one now than when a checkpoint of `workdir`
    was saved; both as `load_frozen` tells them.
    """
    for name, source in current.items():
        before = saved.get(name, {})
        if before.get("digest") != source["digest"]:
            raise UserError(
                f"the checkpoint in {workdir} was trained on the {name} of"
                f" {before.get('folder')} ({before.get('digest')}), but {source['folder']} now"
                f" holds another ({source['digest']}): restore that export or train in a new"
                " workdir"
            )


def open_frozen_sources(experiment: Experiment) -> dict[str, WeightSource]:
    """Opens the folder of every frozen part, by part, those that are random left out.

    UserError where one is missing, foreign or of another config.
    """
    return {
        part.name: _open_source(part)
        for part in stages.frozen_parts(experiment)
        if part.folder != "random"
    }


def _open_source(part: stages.PretrainedPart) -> WeightSource:
    """Where a frozen part comes from, whose config agrees with the one here."""
    if part.field != "flamingo_from" and is_foreign(part.folder):
        kind: Part = "language_model" if part.name == "language_model" else "vision_encoder"
        foreign = open_folder(part.folder, kind)
        _require_equal(to_json(foreign.config), to_json(part.config), part)
        return WeightSource(
            part.folder, foreign.tokenizer_file, foreign.shapes, foreign.digest, foreign.read
        )
    export = open_export(part.folder)
    if export.kind not in part.export_paths:
        raise UserError(
            f"{part.folder} holds a {export.kind} export, but config.{part.field} needs one of"
            f" kind {' or '.join(part.export_paths)}"
        )
    place = part.export_paths[export.kind]
    theirs: Any = export.config[place.config] if place.config else export.config
    # An export of an earlier version lacks the keys that came since: their defaults are what it
    # was.
    theirs = to_json(from_json(type(part.config), theirs, f"the config of {part.folder}"))
    _require_equal(theirs, to_json(part.config), part)
    prefix = _prefix(place.parameters)

    def read(targets: dict[str, jax.ShapeDtypeStruct], process_group: ProcessGroup) -> Parameters:
        export.verify(process_group)
        within = {prefix + name: target for name, target in targets.items()}
        found = export.read_sharded(within, process_group)
        return {name.removeprefix(prefix): value for name, value in found.items()}

    shapes = {
        name.removeprefix(prefix): shape
        for name, shape in export.shapes.items()
        if name.startswith(prefix)
    }
    return WeightSource(part.folder, export.tokenizer_file, shapes, lambda _: export.digest, read)


def _read_part(
    source: WeightSource,
    part: stages.PretrainedPart,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    process_group: ProcessGroup,
) -> Parameters:
    """The wanted parameters by their names here, where they shall lie."""
    prefix = _prefix(part.name)
    targets = {name.removeprefix(prefix): target for name, target in wanted.items()}
    missing = sorted(set(targets) - set(source.shapes))
    if missing:
        raise UserError(
            f"{part.folder} lacks {len(missing)} parameters of the {part.name or 'model'},"
            f" {prefix}{missing[0]} first: export that stage again"
        )
    stored = {
        name: _as_stored(prefix + name, target, source.shapes[name], part.folder)
        for name, target in targets.items()
    }
    return {
        prefix + name: _fitted(value, targets[name])
        for name, value in source.read(stored, process_group).items()
    }


def _prefix(part: str) -> str:
    return part + "/" if part else ""


def _as_stored(
    name: str, target: jax.ShapeDtypeStruct, shape: tuple[int, ...], folder: str
) -> jax.ShapeDtypeStruct:
    """The target in its stored shape, which may be another for a ViT's positions: those of
    another image size are interpolated.
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
    """A ViT's positions interpolated as its own forward does for images of another size; all
    else as it is.
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
    theirs: dict[str, Any], ours: dict[str, Any], part: stages.PretrainedPart, group: str = ""
) -> None:
    for key in sorted(set(theirs) | set(ours)):
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, dict) and isinstance(other, dict):
            _require_equal(other, mine, part, f"{group}{key}.")
        elif key not in FREE and other != mine:
            raise UserError(
                f"{part.folder} was trained with {group}{key} = {other!r}, but this config's"
                f" {part.name or 'model'} has {mine!r}: make them equal"
            )


FREE = ("image_size", "image_fit", "stochastic_depth", "gate_init", "out_scale", "bias_init")
"""What may be another than in an export: an image may have another size and form in training
and in use, and a start is behind it; everything else is part of the weights' meaning.
"""
