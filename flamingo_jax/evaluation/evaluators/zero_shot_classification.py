"""The evaluator `zero_shot_classification`: classification with a contrastive model and prompt
ensembling (CLIP, Radford et al. 2021, section 3.1.4).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.datasets import DatasetReader
from flamingo_jax.evaluation.evaluator_config import EvaluatorConfig
from flamingo_jax.evaluation.evaluators.embedding import Embedder, Parameters
from flamingo_jax.evaluation.evaluators.image_set import ImageSet
from flamingo_jax.evaluation.metrics.top_k import top_k_accuracy
from flamingo_jax.experiment import Experiment
from flamingo_jax.processing.text import text_of
from flamingo_jax.processing.tokenizer import Tokenizer


class ZeroShotClassification:
    """Predicts the class whose text embedding is most similar to the image's.

    The embedding of a class is the normalised mean of the normalised embeddings of its name in
    each template. A record's class is its first caption or answer.
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
        """Reads the classes of the records.

        Raises: UserError for a dataset without classes, a record whose class is not in
          `config.classes`, or a template without {}.
        """
        assert experiment.contrastive is not None
        for template in config.templates:
            if "{}" not in template:
                raise UserError(f"the template {template!r} has no {{}} for the class: write it in")
        if not config.templates:
            raise UserError("there is no template for the classes: '{}' is the name alone")
        kind = datasets.kind(config.path)
        if kind not in ("pairs", "questions"):
            raise UserError(
                f"the dataset {config.path} holds {kind}, but zero-shot classification wants"
                " pairs or questions"
            )
        self.every = every
        self._templates = config.templates
        self._set = ImageSet(datasets, config, kind, experiment.contrastive.vision, experiment.seed)
        labels = [_label(record, kind) for record in self._set.records]
        self.classes = _classes(config.classes, labels)
        self._targets = _targets(labels, self.classes)
        self._embedder = Embedder(experiment, tokenizer, mesh, config.batch_size)

    def compile(
        self, trainable: Parameters, frozen: Parameters
    ) -> Mapping[str, jax.stages.Compiled]:
        """Compiles both encoders."""
        return self._embedder.compile({**trainable, **frozen})

    def __call__(self, trainable: Parameters, frozen: Parameters) -> dict[str, float]:
        """Measures accuracy: {"top_1" and, with more than 5 classes, "top_5": 0 to 1}."""
        parameters = {**trainable, **frozen}
        images = self._embedder.embed_images(parameters, self._set.images)
        scores = images @ self._class_vectors(parameters).T  # [images, classes]
        found = top_k_accuracy(scores, self._targets)
        return {f"top_{rank}": share for rank, share in found.items() if rank < len(self.classes)}

    def _class_vectors(self, parameters: Parameters) -> np.ndarray:
        """Embeds the classes: float32 [C, J], unit vectors."""
        texts = [
            template.replace("{}", name) for name in self.classes for template in self._templates
        ]
        vectors = self._embedder.embed_texts(parameters, texts)  # [classes * templates, J]
        means = vectors.reshape(len(self.classes), len(self._templates), -1).mean(1)
        return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)


def _label(record: Any, kind: str) -> str:
    answers = record["captions"] if kind == "pairs" else record["answers"]
    if not len(answers):
        raise UserError(
            f"the record {text_of(record['id'])!r} has no class: leave it out of the evaluation"
            " data"
        )
    return text_of(answers[0])


def _classes(named: Sequence[str], labels: Sequence[str]) -> list[str]:
    if twice := [name for name, count in Counter(named).items() if count > 1]:
        raise UserError(f"the class {twice[0]!r} is named more than once: name each once")
    classes = list(named) or sorted(set(labels))
    if len(classes) < 2:
        raise UserError(f"there are {len(classes)} classes, but a choice wants two or more")
    return classes


def _targets(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    places = {name: place for place, name in enumerate(classes)}
    for label in labels:
        if label not in places:
            raise UserError(f"a record's class is {label!r}, which is none of the classes named")
    return np.array([places[label] for label in labels])
