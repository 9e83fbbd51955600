"""The evaluator `retrieval`: image-text retrieval with a contrastive model in both directions,
R@1, R@5 and R@10 as in CLIP and ALIGN.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.datasets import DatasetReader
from flamingo_jax.evaluation.evaluator_config import EvaluatorConfig
from flamingo_jax.evaluation.evaluators.embedding import Embedder, Parameters
from flamingo_jax.evaluation.evaluators.image_set import ImageSet
from flamingo_jax.evaluation.metrics.retrieval import recall_at_k
from flamingo_jax.experiment import Experiment
from flamingo_jax.processing.text import text_of
from flamingo_jax.processing.tokenizer import Tokenizer


class Retrieval:
    """Retrieves each image's captions among all captions, and each caption's image among all
    images, by cosine similarity.

    For an image with several captions, any of them counts as a match. Captions with equal text
    are separate candidates, each with its own image as its only match, and tie; with the
    model's `merge_duplicates` they are one candidate that matches all their images.
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
        """Reads the captions.

        Raises: UserError where the dataset is not of kind pairs, or a record has no caption.
        """
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
        """Measures recall: {"image_to_text_recall@K" and "text_to_image_recall@K": 0 to 1}."""
        parameters = {**trainable, **frozen}
        images = self._embedder.embed_images(parameters, self._set.images)  # [images, J]
        # Equal captions are encoded once, so that their similarities are exactly equal.
        different = list(dict.fromkeys(self._texts))
        places = {text: place for place, text in enumerate(different)}
        texts = self._embedder.embed_texts(parameters, different)
        # [images, captions]
        similarities = (images @ texts.T)[:, [places[text] for text in self._texts]]
        to_text = recall_at_k(similarities, self._matches)
        to_image = recall_at_k(similarities.T, self._matches.T)
        return {f"image_to_text_recall@{rank}": share for rank, share in to_text.items()} | {
            f"text_to_image_recall@{rank}": share for rank, share in to_image.items()
        }


def _texts_and_matches(images: ImageSet, merge_duplicates: bool) -> tuple[list[str], np.ndarray]:
    """Returns (all captions, bool [images, captions], True where a caption is the image's)."""
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
