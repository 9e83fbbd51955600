"""Embeds images and texts with a contrastive model's encoders, in batches on the mesh."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flamingo_jax.experiment import Experiment
from flamingo_jax.models.dual_encoder import DualEncoder
from flamingo_jax.partitioning.mesh import ROWS, batch_shardings
from flamingo_jax.processing.sequences import text_tokens
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.pytrees import from_flat
from flamingo_jax.tasks import stages

Array = jax.Array
Parameters = Mapping[str, Array]
"""{flat name: array}: trainable, frozen, or both together."""
Batch = tuple[int, dict[str, np.ndarray]]
"""(number of rows that are not padding, arrays)."""


class Embedder:
    """Embeds images and texts with the parameters that each call is given.

    All processes of a run must call it with the same inputs; each gets all embeddings.

    batch_size: rounded up to a multiple of the mesh's data shards.
    """

    def __init__(self, experiment: Experiment, tokenizer: Tokenizer, mesh: Mesh, batch_size: int):
        # The module's structure alone; its weights come with each call.
        model = nnx.eval_shape(
            lambda: stages.build_model(experiment, nnx.Rngs(params=jax.random.key(0)))
        )
        graph, _ = nnx.split(model)
        config = stages.model_config(experiment)
        self._image_size, self._length = config.vision.image_size, config.text.max_length
        self._tokenizer, self._mesh = tokenizer, mesh
        shards = int(np.prod([mesh.shape[axis] for axis in ROWS]))
        self._batch_size = -(-batch_size // shards) * shards
        self._images: Callable[..., Array] = self._jit(
            lambda model, batch: model.encode_images(batch["images"]), graph
        )
        self._texts: Callable[..., Array] = self._jit(
            lambda model, batch: model.encode_texts(batch["tokens"], batch["mask"]), graph
        )

    def _jit(self, encode: Callable[[DualEncoder, Any], Array], graph: Any) -> Any:
        def run(parameters: Parameters, batch: Mapping[str, Array]) -> Array:
            return encode(nnx.merge(graph, nnx.State(from_flat(parameters))), batch)

        # Replicated, so that each process can fetch all embeddings: similarities are computed
        # on the host.
        return jax.jit(run, out_shardings=NamedSharding(self._mesh, PartitionSpec()))

    def compile(self, parameters: Parameters) -> dict[str, jax.stages.Compiled]:
        """Compiles both encoders for parameters with these shapes and shardings."""
        compiled = {
            "images": self._images.lower(  # type: ignore[attr-defined]
                parameters, self._place(next(self._image_batches([]))[1])
            ).compile(),
            "texts": self._texts.lower(  # type: ignore[attr-defined]
                parameters, self._place(next(self._text_batches([]))[1])
            ).compile(),
        }
        self._images, self._texts = compiled["images"], compiled["texts"]
        return compiled

    def embed_images(self, parameters: Parameters, images: Iterable[np.ndarray]) -> np.ndarray:
        """Embeds uint8 [H, W, 3] images of the model's size: float32 [N, J], unit vectors."""
        return self._embed(self._images, parameters, self._image_batches(images))

    def embed_texts(self, parameters: Parameters, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts, truncated to the model's length: float32 [N, J], unit vectors."""
        return self._embed(self._texts, parameters, self._text_batches(texts))

    def _embed(
        self,
        encode: Callable[..., Array],
        parameters: Parameters,
        batches: Iterator[Batch],
    ) -> np.ndarray:
        """Encodes batches one after the other and drops their padding rows."""
        found = []
        for count, batch in batches:
            if count:
                found.append(jax.device_get(encode(parameters, self._place(batch)))[:count])
        return np.concatenate(found)

    def _image_batches(self, images: Iterable[np.ndarray]) -> Iterator[Batch]:
        """Pads images to batches of [batch_size, H, W, 3]."""
        for count, part in _parts(images, self._batch_size):
            batch = np.zeros((self._batch_size, self._image_size, self._image_size, 3), np.uint8)
            for row, image in enumerate(part):
                batch[row] = image
            yield count, {"images": batch}

    def _text_batches(self, texts: Iterable[str]) -> Iterator[Batch]:
        """Tokenises texts and pads them to batches of [batch_size, length]."""
        for count, part in _parts(texts, self._batch_size):
            tokens = np.full((self._batch_size, self._length), self._tokenizer.pad, np.int32)
            mask = np.zeros(tokens.shape, bool)
            for row, text in enumerate(part):
                ids = text_tokens(text, self._tokenizer)
                if len(ids) > self._length:
                    # As in training, a truncated text still ends with <EOS>.
                    ids = np.append(ids[: self._length - 1], ids[-1])
                tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
            yield count, {"tokens": tokens, "mask": mask}

    def _place(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Shards a batch over the mesh; every process holds the global batch and places its
        shards.
        """
        shardings = batch_shardings(batch, self._mesh)
        return {
            name: jax.make_array_from_callback(
                array.shape, shardings[name], functools.partial(np.ndarray.__getitem__, array)
            )
            for name, array in batch.items()
        }


def _parts(items: Iterable[Any], size: int) -> Iterator[tuple[int, list[Any]]]:
    """Splits items into parts of up to `size`, as (count, part); one empty part for no items,
    from which `compile` gets a batch's shapes.
    """
    part: list[Any] = []
    some = False
    for item in items:
        part.append(item)
        some = True
        if len(part) == size:
            yield size, part
            part = []
    if part or not some:
        yield len(part), part
