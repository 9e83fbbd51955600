"""Image-text retrieval of a contrastive encoder, both ways (CLIP, ALIGN: R@1, R@5, R@10)."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.datasets import DatasetReader
from flamingo_jax.evaluation.evaluator_config import EvaluatorConfig
from flamingo_jax.evaluation.evaluators.embedding import Embedder, Parameters
from flamingo_jax.evaluation.evaluators.image_set import ImageSet, text_of
from flamingo_jax.evaluation.metrics.retrieval import recall_at
from flamingo_jax.experiment import Experiment
from flamingo_jax.processing.tokenizer import Tokenizer


class Retrieval:
    """Finds each image's captions among all captions, and each caption's image among all images.

    Of an image with several captions any may be found first. Equal captions are apart, so that
    each finds its own image alone and which of them comes first is chance, unless the model's
    `merge_duplicates` says that they are one: then it finds any of theirs.
    """

    def __init__(
        self,
        config: EvaluatorConfig,
        every: int,
        experiment: Experiment,
        tokenizer: Tokenizer,
        datasets: DatasetReader,
        mesh: Mesh,
    ):
        """Raises UserError where the dataset holds no pairs, or a record has no caption."""
        assert experiment.contrastive is not None
        kind = datasets.kind(config.path)
        if kind != "pairs":
            raise UserError(f"the dataset {config.path} holds {kind}, but retrieval wants pairs")
        self.every = every
        self._set = ImageSet(datasets, config, kind, experiment.contrastive.vision, experiment.seed)
        self._texts, self._matches = _texts_and_matches(
            self._set, experiment.contrastive.merge_duplicates
        )
        self._embedder = Embedder(experiment, tokenizer, mesh, config.batch_size)

    def compile(
        self, trainable: Parameters, frozen: Parameters
    ) -> Mapping[str, jax.stages.Compiled]:
        """Compiles both encoders."""
        return self._embedder.compile({**trainable, **frozen})

    def __call__(self, trainable: Parameters, frozen: Parameters) -> dict[str, float]:
        """Measures {"image_to_text_recall@K" and "text_to_image_recall@K": 0 to 1}."""
        parameters = {**trainable, **frozen}
        images = self._embedder.embed_images(parameters, self._set.images)
        # Equal captions are encoded once, so that they tie to the bit.
        different = list(dict.fromkeys(self._texts))
        places = {text: place for place, text in enumerate(different)}
        texts = self._embedder.embed_texts(parameters, different)
        similarities = (images @ texts.T)[:, [places[text] for text in self._texts]]
        to_text = recall_at(similarities, self._matches)
        to_image = recall_at(similarities.T, self._matches.T)
        return {f"image_to_text_recall@{rank}": share for rank, share in to_text.items()} | {
            f"text_to_image_recall@{rank}": share for rank, share in to_image.items()
        }


def _texts_and_matches(images: ImageSet, merge_duplicates: bool) -> tuple[list[str], np.ndarray]:
    """Returns all captions, and bool [images, captions]: which of them are whose."""
    places: dict[Any, int] = {}
    texts: list[str] = []
    own: list[list[int]] = []
    for number, record in enumerate(images.records):
        captions = [text_of(caption) for caption in record["captions"]]
        if not captions:
            raise UserError(
                f"the record {text_of(record['id'])!r} has no caption to find: leave it out of"
                " the evaluation data"
            )
        own.append([])
        for place, caption in enumerate(captions):
            key = caption if merge_duplicates else (number, place)
            if key not in places:
                places[key] = len(texts)
                texts.append(caption)
            own[-1].append(places[key])
    matches = np.zeros((len(own), len(texts)), bool)
    for number, found in enumerate(own):
        matches[number, found] = True
    return texts, matches
