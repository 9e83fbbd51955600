"""The frozen vision encoder by itself, for encoding every image of a dataset once and caching
the features (`training.cache_features`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flamingo_jax.distributed.process_group import ProcessGroup
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.interop.weight_sources import open_source, read_part
from flamingo_jax.models.quantised import quantise_part
from flamingo_jax.models.vision import VisionEncoder, vision_encoder
from flamingo_jax.processing.normalise import normalise
from flamingo_jax.pytrees import from_flat, to_flat
from flamingo_jax.tasks import stages
from flamingo_jax.training.state import Parameters
from flamingo_jax.weight_parts import dtype_of


class FrozenEncoder(NamedTuple):
    """Encodes images with the frozen vision encoder.

    digest: identifies weights, image size and dtype; cached features are stored under it.
    shape, dtype: of one image's features, [S, C].
    encode: uint8 [n, H, W, 3] -> [n, S, C].
    """

    digest: str
    shape: tuple[int, int]
    dtype: np.dtype
    encode: Callable[[np.ndarray], np.ndarray]


def load_frozen_encoder(
    experiment: Experiment, process_group: ProcessGroup | None = None
) -> FrozenEncoder:
    """Loads the frozen vision encoder onto this process's devices, replicated; images are
    split over them.

    process_group: see `load_frozen`.
    Raises: UserError where there is no frozen encoder, or its export does not fit the config.
    """
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
    source = open_source(part)
    quantised = bool(stages.quantised_parts(experiment))

    def build() -> VisionEncoder:
        encoder = vision_encoder(config, rngs=nnx.Rngs(0))
        if quantised:
            quantise_part(encoder)
        return encoder

    graph, shapes = nnx.split(nnx.eval_shape(build))
    frozen_dtype = stages.frozen_dtype(experiment)
    mesh, prefix = Mesh(np.asarray(jax.local_devices()), "data"), f"{part.name}/"
    whole = NamedSharding(mesh, PartitionSpec())
    wanted = {
        prefix + name: jax.ShapeDtypeStruct(s.shape, dtype_of(name, frozen_dtype), sharding=whole)
        for name, s in to_flat(shapes).items()
    }
    parameters = {
        name.removeprefix(prefix): value
        for name, value in read_part(source, part, wanted, process_group).items()
    }

    @functools.partial(jax.jit, in_shardings=(None, NamedSharding(mesh, PartitionSpec("data"))))
    def features(parameters: Parameters, images: jax.Array) -> jax.Array:
        encoder = nnx.merge(graph, nnx.State(from_flat(parameters)))
        grid = encoder(normalise(images, config.mean, config.std, dtype))
        return grid.reshape(grid.shape[0], -1, grid.shape[-1])

    def encode(images: np.ndarray) -> np.ndarray:
        # Padded to a multiple of the devices.
        padding = -len(images) % mesh.size
        return np.asarray(features(parameters, np.pad(images, ((0, padding), *[(0, 0)] * 3))))[
            : len(images)
        ]

    image = jax.ShapeDtypeStruct((mesh.size, config.image_size, config.image_size, 3), jnp.uint8)
    _, cells, channels = jax.eval_shape(features, parameters, image).shape
    # The name of the features' folder: all that they depend on.
    fit = "" if config.image_fit == "pad" else f"_{config.image_fit}"
    name = f"{source.digest(process_group)[:16]}_{config.image_size}{fit}_{dtype.name}"
    if experiment.training.frozen_dtype != "compute_dtype":
        name += f"_{experiment.training.frozen_dtype}"
    return FrozenEncoder(name, (cells, channels), np.dtype(dtype), encode)
