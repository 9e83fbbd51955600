"""Retrieval and zero-shot classification against one image and one text at a time."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.evaluator_config import EvaluatorConfig
from flamingo_jax.evaluation.evaluators.factory import make_evaluators
from flamingo_jax.evaluation.metrics.retrieval import recall_at_k
from flamingo_jax.experiment import Experiment, MeshConfig
from flamingo_jax.models import nfnet
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.processing.sequences import text_tokens
from flamingo_jax.pytrees import to_flat
from tests.evaluation.evaluators.memory_datasets import (
    NAMES,
    MemoryDatasets,
    contrastive,
    image,
    pair,
    question,
)
from tests.inference.tiny_models import make_tokenizer
from tests.models.filling import ONE_STAGE, filled_dual_encoder

TOKENIZER = make_tokenizer()
PAIRS = [pair(n, NAMES[n % 5], f"{NAMES[(3 * n + 1) % 7]} at the top left") for n in range(11)]
"""Several images have the same caption."""
QUESTIONS = [question(n, NAMES[n % 6]) for n in range(13)]
DATASETS = MemoryDatasets(
    pairs=("pairs", {"validation": PAIRS}),
    asked=("questions", {"validation": QUESTIONS}),
    bare=("pairs", {"validation": [pair(1)]}),
    text=("text", {"validation": []}),
)


@pytest.fixture(autouse=True, scope="module")
def variant() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(nfnet.VARIANTS, "one_stage", ONE_STAGE)
        yield


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return contrastive(TOKENIZER.pieces)


@pytest.fixture(scope="module")
def vectors(experiment: Experiment) -> tuple[Any, Any, Any]:
    """The parameters; the vector of an image by its number, and of a text."""
    model = filled_dual_encoder(experiment.contrastive)
    graph, state = nnx.split(model)
    encode_image = jax.jit(lambda x: nnx.merge(graph, state).encode_images(x))
    encode_text = jax.jit(lambda *x: nnx.merge(graph, state).encode_texts(*x))

    def of_text(text: str) -> np.ndarray:
        ids = text_tokens(text, TOKENIZER)
        if len(ids) > 8:
            ids = np.append(ids[:7], ids[-1])
        tokens, mask = np.full((1, 8), TOKENIZER.pad), np.zeros((1, 8), bool)
        tokens[0, : len(ids)], mask[0, : len(ids)] = ids, True
        return np.asarray(encode_text(tokens, mask))[0]

    return (
        to_flat(state),
        lambda number: np.asarray(encode_image(image(number)[None]))[0],
        of_text,
    )


def measure(
    experiment: Experiment, parameters: Any, mesh: MeshConfig = MeshConfig(), **config: Any
) -> dict[str, float]:
    made = dataclasses.replace(experiment, evaluators={"it": EvaluatorConfig(**config)})
    devices = make_mesh(mesh)
    with jax.set_mesh(devices):
        evaluator = make_evaluators(made, TOKENIZER, DATASETS, devices)["it"]
        assert evaluator.every == (config.get("every") or experiment.training.evaluate_every)
        found = evaluator(parameters, {})
        assert set(evaluator.compile(parameters, {})) == {"images", "texts"}
        np.testing.assert_allclose(list(evaluator({}, parameters).values()), list(found.values()))
    return found


@pytest.mark.parametrize("merged", [False, True])
def test_retrieval_is_that_of_one_by_one(
    experiment: Experiment, vectors: tuple[Any, Any, Any], merged: bool
) -> None:
    parameters, of_image, of_text = vectors
    given = contrastive(TOKENIZER.pieces, merge_duplicates=merged)
    found = measure(
        given, parameters, MeshConfig(4, 2, 1), path="pairs", batch_size=3, every=7, limit=0
    )
    own = [[text.decode() for text in record["captions"]] for record in PAIRS]
    texts = [(n, text) for n, some in enumerate(own) for text in some]
    if merged:
        texts = [(-1, text) for text in dict.fromkeys(text for _, text in texts)]

    def is_match(n: int, owner: int, text: str) -> bool:
        return text in own[n] if merged else n == owner

    scores = np.array([[of_image(n) @ of_text(text) for _, text in texts] for n in range(11)])
    mine = np.array([[is_match(n, *text) for text in texts] for n in range(11)])
    for name, similar, matches in (
        ("image_to_text", scores, mine),
        ("text_to_image", scores.T, mine.T),
    ):
        for rank, share in recall_at_k(similar, matches).items():
            assert found[f"{name}_recall@{rank}"] == pytest.approx(share)
    assert len(found) == 6


def test_zero_shot_classification_averages_the_vectors_of_its_templates(
    experiment: Experiment, vectors: tuple[Any, Any, Any]
) -> None:
    parameters, of_image, of_text = vectors
    templates = ("{}", "this is {}")
    found = measure(
        experiment,
        parameters,
        kind="zero_shot_classification",
        path="asked",
        templates=templates,
    )
    classes = sorted(NAMES[:6])
    means = np.array(
        [np.mean([of_text(t.replace("{}", name)) for t in templates], 0) for name in classes]
    )
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    order = [np.argsort(-(means @ of_image(n))) for n in range(13)]
    truth = [classes.index(NAMES[n % 6]) for n in range(13)]
    for rank in (1, 5):
        hits = [truth[n] in order[n][:rank] for n in range(13)]
        assert found[f"top_{rank}"] == pytest.approx(np.mean(hits))


def test_a_limit_draws_and_a_period_is_the_losses(
    experiment: Experiment, vectors: tuple[Any, Any, Any]
) -> None:
    found = measure(experiment, vectors[0], path="pairs", limit=4)
    # Of four images and their eight captions all are among the first ten.
    assert found["text_to_image_recall@5"] == found["image_to_text_recall@10"] == 1.0


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"path": ""}, "config.evaluators.it.path is empty"),
        ({"path": "text"}, "config.evaluators.it: the dataset text holds text"),
        ({"path": "asked"}, "retrieval wants pairs"),
        ({"path": "bare"}, "the record 'p1' has no caption"),
        ({"path": "pairs", "kind": "few_shot"}, "measures the model of task 'flamingo'"),
        (
            {"path": "asked", "kind": "zero_shot_classification", "classes": ("a", "b")},
            "which is none of the classes named",
        ),
        (
            {"path": "asked", "kind": "zero_shot_classification", "classes": ("a", "a")},
            "'a' is named more than once",
        ),
        (
            {"path": "asked", "kind": "zero_shot_classification", "templates": ("a photo",)},
            "'a photo' has no {} for the class",
        ),
    ],
)
def test_what_cannot_be_measured_is_told_at_once(
    experiment: Experiment, config: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        measure(experiment, {}, **config)
    assert sentence in str(caught.value)
