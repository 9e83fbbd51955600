"""Published models as modules to call, their weights read straight into sharded arrays."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flamingo_jax.experiment import LanguageModelConfig, VisionConfig
from flamingo_jax.interop.folders import Foreign, open_folder
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.models.vision import vision_encoder
from flamingo_jax.models.vit import ViT
from flamingo_jax.partitioning import rules
from flamingo_jax.processing.images import load
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.pytrees import from_flat


@dataclasses.dataclass(frozen=True)
class LoadedLanguageModel:
    """`model(tokens, positions, segments)` gives logits, see `LanguageModel`."""

    model: LanguageModel
    tokenizer: Tokenizer | None
    """None where the folder holds none."""
    config: LanguageModelConfig


@dataclasses.dataclass(frozen=True)
class LoadedVisionEncoder:
    """`model(preprocess([data, ...]))` gives grid features [M, h, w, C], see `ViT`."""

    model: ViT
    config: VisionConfig

    def preprocess(self, images: list[bytes]) -> np.ndarray:
        """Encoded images -> float32 [M, S, S, 3] as the encoder takes them: squares by the
        config's image_fit, normalised.

        Raises: ImageError for what is no image.
        """
        mean, std = (
            np.asarray(values, np.float32) for values in (self.config.mean, self.config.std)
        )
        pixels = [
            load(data, self.config.image_size, self.config.mean, self.config.image_fit)
            for data in images
        ]
        return (np.stack(pixels).astype(np.float32) / 255 - mean) / std


def load_language_model(
    folder: str | pathlib.Path, *, mesh: Mesh | None = None, dtype: Any = None, weights: Any = None
) -> LoadedLanguageModel:
    """A Llama, Mistral, Qwen2 or Qwen3 as transformers save them.

    Args:
      mesh: axes data, fsdp and model (`partitioning.mesh.make_mesh`), over which the parameters
        lie as in training; None: on the first local device.
      dtype: compute type; by default float32 on CPU and bfloat16 on accelerators.
      weights: type that the parameters are held in; by default the stored ones.

    Raises: UserError where the folder's config cannot be honoured or its tensors are not those
      of the config.
    """
    found = open_folder(folder, "language_model")
    tokenizer = (
        Tokenizer.load(found.tokenizer_file, found.config.vocab_size)
        if found.tokenizer_file is not None
        else None
    )
    graph = _graph(
        lambda: LanguageModel(found.config, rngs=nnx.Rngs(0), dtype=dtype or _compute_dtype())
    )
    shardings = (
        {}
        if mesh is None
        else rules.shardings(
            "language_modelling",
            {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in found.shapes.items()},
            mesh,
        )
    )
    return LoadedLanguageModel(_merge(graph, found, shardings, weights), tokenizer, found.config)


def load_vision_encoder(
    folder: str | pathlib.Path, *, mesh: Mesh | None = None, weights: Any = None
) -> LoadedVisionEncoder:
    """The vision tower of a CLIP or SigLIP as transformers save them, alone or within the whole
    model; it computes in the type of its images.

    Args, Raises: as of `load_language_model`; on a mesh it is whole on every device.
    """
    found = open_folder(folder, "vision_encoder")
    graph = _graph(lambda: vision_encoder(found.config, rngs=nnx.Rngs(0)))
    shardings = (
        {} if mesh is None else dict.fromkeys(found.shapes, NamedSharding(mesh, PartitionSpec()))
    )
    return LoadedVisionEncoder(_merge(graph, found, shardings, weights), found.config)


def _compute_dtype() -> Any:
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def _graph(build: Any) -> Any:
    return nnx.split(nnx.eval_shape(build))[0]


def _merge(graph: Any, found: Foreign, shardings: dict[str, NamedSharding], weights: Any) -> Any:
    dtypes = found.dtypes()
    targets = {
        name: jax.ShapeDtypeStruct(shape, weights or dtypes[name], sharding=shardings.get(name))
        for name, shape in found.shapes.items()
    }
    return nnx.merge(graph, nnx.State(from_flat(found.read(targets))))
