"""Loads language models and vision encoders from published folders and exports, with their
weights read straight into sharded arrays.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flamingo_jax import paths
from flamingo_jax.configuring import from_json
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import LanguageModelConfig, VisionConfig
from flamingo_jax.interop.documents import CONFIG
from flamingo_jax.interop.folders import ModelPart, open_folder
from flamingo_jax.interop.quantised import read_quantised
from flamingo_jax.interop.weight_sources import ExportedPart, WeightSource, declare, open_model
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.models.quantised import quantise_part
from flamingo_jax.models.vision import VisionEncoder, vision_encoder
from flamingo_jax.partitioning import rules
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.processing.visuals import Image, ImageSource
from flamingo_jax.pytrees import from_flat, to_flat
from flamingo_jax.tasks.stages import EXPORT_PATHS, FLAMINGO_PATHS


class LoadedLanguageModel(NamedTuple):
    """Holds a language model and its tokenizer.

    `model(tokens, positions, segments)` returns logits, see `LanguageModel`; `model.config` is
    its config. tokenizer: None if the folder has none.
    """

    model: LanguageModel
    tokenizer: Tokenizer | None


@dataclasses.dataclass(frozen=True)
class LoadedVisionEncoder:
    """Encodes images: `encoder([image, ...])`, or `encoder.model(pixels)` with pixels from
    `preprocess`.
    """

    model: VisionEncoder
    config: VisionConfig

    def __call__(self, images: Sequence[Image | ImageSource]) -> jax.Array:
        """Encodes M images into grid features, float32 [M, h, w, C]; see `ViT` and `NFNet`.

        Raises: UserError for an image that cannot be read.
        """
        graph, state = nnx.split(self.model)
        return _encode(graph, state, self.preprocess(images))

    def preprocess(self, images: Sequence[Image | ImageSource]) -> np.ndarray:
        """Makes images square by the config's image_fit, resizes and normalises them: float32
        [M, S, S, 3].

        Raises: UserError for an image that cannot be read.
        """
        mean, std = (
            np.asarray(values, np.float32) for values in (self.config.mean, self.config.std)
        )
        sources = [image if isinstance(image, Image) else Image(image) for image in images]
        pixels = [source.visual(self.config, 1).frames[0] for source in sources]
        return (np.stack(pixels).astype(np.float32) / 255 - mean) / std


@functools.partial(jax.jit, static_argnames="graph")
def _encode(graph: Any, state: nnx.State, pixels: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(pixels).astype(jnp.float32)


def load_language_model(
    folder: str | pathlib.Path, *, mesh: Mesh | None = None, dtype: Any = None, weights: Any = None
) -> LoadedLanguageModel:
    """Loads a published language model, or the language model of an export.

    Args:
      folder: a folder as transformers save it (`interop.families` lists the families), or an
        export of a language model or a Flamingo.
      mesh: mesh with the axes data, fsdp and model (`partitioning.mesh.make_mesh`), over which
        the parameters are sharded as in training; None for the first local device.
      dtype: dtype of the computation; by default float32 on CPU and bfloat16 on accelerators.
      weights: dtype of the parameters, by default the one on disk; or "int8" (see
        `models.quantised`), in which they are quantised as they are read.

    Returns: (model, tokenizer). `model(tokens, positions, segments)`, each int32 [B, L] with
      segment 0 for padding, returns logits, float32 [B, L, V].

    Raises: UserError if the folder's config is not supported or its tensors do not agree with
      it.
    """
    found, config = _open(folder, "language_model")
    tokenizer = (
        Tokenizer.load(found.tokenizer_file, config.vocab_size)
        if found.tokenizer_file is not None
        else None
    )
    graph, shapes = _abstract(
        lambda: LanguageModel(config, rngs=nnx.Rngs(0), dtype=dtype or _compute_dtype()), weights
    )
    shardings = None if mesh is None else rules.shardings("language_modelling", shapes, mesh)
    model = _merge(graph, found, _targets(found, shapes, shardings, weights))
    return LoadedLanguageModel(model, tokenizer)


def load_vision_encoder(
    folder: str | pathlib.Path, *, mesh: Mesh | None = None, weights: Any = None
) -> LoadedVisionEncoder:
    """Loads a published vision encoder, or the vision encoder of an export.

    Args:
      folder: a CLIP or SigLIP as transformers save it, the complete model or the vision tower
        alone; or an export of a contrastive model or a Flamingo.
      mesh, weights: as in `load_language_model`; on a mesh the encoder is replicated.

    Returns: an encoder that takes images; its `model` computes in the dtype of the pixels.

    Raises: UserError as `load_language_model`.
    """
    found, config = _open(folder, "vision_encoder")
    graph, shapes = _abstract(lambda: vision_encoder(config, rngs=nnx.Rngs(0)), weights)
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    shardings = None if whole is None else dict.fromkeys(shapes, whole)
    targets = _targets(found, shapes, shardings, weights)
    return LoadedVisionEncoder(_merge(graph, found, targets), config)


def _compute_dtype() -> Any:
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def _abstract(build: Any, weights: Any) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    """Returns the graph of a model and the shapes of its parameters, with int8 weights if that
    is what `weights` says.
    """

    def make() -> Any:
        model = build()
        if _is_int8(weights):
            quantise_part(model)
        return model

    graph, state = nnx.split(nnx.eval_shape(make))
    return graph, to_flat(state)


def _is_int8(weights: Any) -> bool:
    return weights is not None and jnp.dtype(weights) == jnp.int8


def _targets(
    source: WeightSource,
    shapes: dict[str, jax.ShapeDtypeStruct],
    shardings: dict[str, NamedSharding] | None,
    weights: Any,
) -> dict[str, jax.ShapeDtypeStruct]:
    return declare(source, shapes, shardings, None if _is_int8(weights) else weights)


def _open(folder: str | pathlib.Path, part: ModelPart) -> tuple[WeightSource, Any]:
    """Opens a part of an export, or a published folder: its weights and its config."""
    try:
        ours = "format" in json.loads((paths.as_path(folder) / CONFIG).read_bytes())
    except (OSError, ValueError, TypeError):
        ours = False  # `open_folder` says what is wrong with it.
    if not ours:
        published = open_folder(folder, part)
        return published, published.config
    model = open_model(folder)
    export = model.export
    held_by = EXPORT_PATHS[part] | {"flamingo": FLAMINGO_PATHS[part]}
    path = held_by.get(export.kind)
    if path is None:
        raise UserError(
            f"{folder} holds a {export.kind} export, which has no {part.replace('_', ' ')}: name"
            f" one of kind {' or '.join(held_by)}"
        )
    config = export.config[path.config] if path.config else export.config
    kind = LanguageModelConfig if part == "language_model" else VisionConfig
    parsed = from_json(kind, config, f"the config of {folder}")
    return ExportedPart(model, path.prefix), parsed


def _merge(graph: Any, source: WeightSource, targets: dict[str, jax.ShapeDtypeStruct]) -> Any:
    return nnx.merge(graph, nnx.State(from_flat(read_quantised(source, targets))))
