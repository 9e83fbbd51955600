"""The contrastive loss against float64 numpy written out pair by pair, and the task over
microbatches and devices.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flamingo_jax.experiment import (
    ContrastiveConfig,
    DatasetConfig,
    TextEncoderConfig,
    VisionConfig,
)
from flamingo_jax.models.dual_encoder import DualEncoder
from flamingo_jax.tasks.contrastive import ContrastiveTask, contrastive_loss
from flamingo_jax.tasks.task import Loss
from flamingo_jax.training.state import split_model
from flamingo_jax.training.step import gradients
from tests.models.filling import filled_dual_encoder
from tests.rounding import assert_close
from tests.training.reference import dataset_after_dataset

CONFIG = ContrastiveConfig(
    vision=VisionConfig(variant="one_stage", image_size=16),
    text=TextEncoderConfig(vocab_size=11, layers=1, width=8, heads=2, max_length=4),
    joint_width=12,
)
BATCH = 16
TERMS = 200 + 12 + 3 * BATCH
"""Of an encoder, the length of what it gives, and the scores of a row and of a column."""


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return filled_dual_encoder(CONFIG)


@pytest.fixture(scope="module")
def batch() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 11, (BATCH, 4)).astype(np.int32)
    images = rng.integers(0, 256, (BATCH, 16, 16, 3)).astype(np.uint8)
    mask = np.arange(4) < rng.integers(1, 5, (BATCH, 1))
    return {
        "images": jnp.asarray(images),
        "tokens": jnp.asarray(tokens),
        "mask": jnp.asarray(mask),
    }


def units(seed: int, count: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((count, 5))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cross_entropy(scores: np.ndarray, answers: list[int], smoothing: float) -> float:
    """Of one image's (or text's) scores, the target shared among `answers`."""
    probabilities = np.exp(scores) / np.exp(scores).sum()
    loss = 0.0
    for place, probability in enumerate(probabilities):
        target = smoothing / len(scores) + (
            (1 - smoothing) / len(answers) if place in answers else 0.0
        )
        loss -= target * np.log(probability)
    return loss


def by_hand(
    images: np.ndarray, texts: np.ndarray, scale: float, smoothing: float, captions: list[str]
) -> tuple[float, float]:
    scores = scale * images @ texts.T
    loss = hits = 0.0
    for row, caption in enumerate(captions):
        answers = [place for place, other in enumerate(captions) if other == caption]
        loss += cross_entropy(scores[row], answers, smoothing) + cross_entropy(
            scores[:, row], answers, smoothing
        )
        hits += int(scores[row].argmax()) in answers
    return loss / len(captions), hits / len(captions)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("captions", ["abcdef", "abacca"])
def test_equals_the_sum_written_out(smoothing: float, captions: str) -> None:
    images, texts = units(0, 6), units(1, 6)
    same = (
        jnp.array([[a == b for b in captions] for a in captions])
        if len(set(captions)) < 6
        else None
    )
    loss, accuracy = contrastive_loss(
        jnp.asarray(images, jnp.float32),
        jnp.asarray(texts, jnp.float32),
        jnp.float32(7),
        smoothing,
        same,
    )
    expected = by_hand(images, texts, 7.0, smoothing, list(captions))
    # Scores of five products up to 7, and sums over six rows and columns.
    assert_close((loss, accuracy), expected, terms=5 + 3 * 6, size=7.0)


def test_scores_alike_give_the_logarithm_of_the_batch() -> None:
    ones = jnp.ones((8, 1))
    assert_close(contrastive_loss(ones, ones, jnp.float32(3), 0.0)[0], 2 * np.log(8), terms=3 * 8)


@pytest.mark.parametrize("captions", ["abcdef", "abacca"])
def test_rows_without_a_pair_are_as_if_not_there(captions: str) -> None:
    images, texts = (jnp.asarray(units(seed, 6), jnp.float32) for seed in (0, 1))
    same = jnp.array([[a == b for b in captions] for a in captions])
    kept = jnp.array([0, 1, 3, 4])
    real = jnp.zeros(6, bool).at[kept].set(True)
    whole = contrastive_loss(images, texts, jnp.float32(7), 0.1, same, real)
    part = contrastive_loss(images[kept], texts[kept], jnp.float32(7), 0.1, same[kept][:, kept])
    assert_close(whole, part, terms=5 + 3 * 6, size=7.0)
    grad = jax.grad(lambda x: contrastive_loss(x, texts, jnp.float32(7), 0.1, same, real)[0])(
        images
    )
    np.testing.assert_array_equal(grad[jnp.array([2, 5])], 0)
    assert bool(jnp.isfinite(grad).all())
    assert (
        float(contrastive_loss(images, texts, jnp.float32(7), 0.1, same, jnp.zeros(6, bool))[0])
        == 0
    )


def test_the_task_scores_the_models_vectors(
    model: DualEncoder, batch: dict[str, jax.Array]
) -> None:
    """Captions are the same where their real tokens are, whatever their padding holds; an empty
    row is left out.
    """
    tokens = batch["tokens"].at[5].set(batch["tokens"][2]).at[7].set(batch["tokens"][2])
    mask = (
        batch["mask"]
        .at[jnp.array([2, 5, 7])]
        .set(jnp.array([True, True, False, False]))
        .at[11]
        .set(False)
    )
    batch = batch | {"tokens": tokens.at[5, 2:].set(9), "mask": mask}
    images = np.asarray(model.encode_images(batch["images"]), np.float64)
    texts = np.asarray(model.encode_texts(batch["tokens"], mask), np.float64)
    scale = float(np.exp(model.log_inverse_temperature[...]))
    kept = np.flatnonzero(np.arange(BATCH) != 11)
    captions = [
        str(np.asarray(t)[np.asarray(m)]) for t, m in zip(batch["tokens"], mask, strict=True)
    ]
    for merge in (False, True):
        loss = ContrastiveTask(dataclasses.replace(CONFIG, merge_duplicates=merge)).losses(
            model, {"": batch}, None
        )[""]
        names = [captions[row] if merge else str(row) for row in kept]
        expected = by_hand(images[kept], texts[kept], scale, 0.1, names)
        total, weight = loss.metrics["accuracy"]
        assert_close(
            (loss.total / loss.weight, total / weight),
            expected,
            terms=12 + 3 * BATCH,
            size=scale,
        )


Gradient = tuple[Loss, dict[str, jax.Array]]


def gradient(model: DualEncoder, batch: dict[str, jax.Array], microbatches: int) -> Gradient:
    """The loss and its gradient as the update takes them."""
    graph, parameters = split_model(model)
    task = ContrastiveTask(model.config)
    data = {"align": DatasetConfig(microbatches=microbatches)}
    losses, gradient, _ = jax.jit(
        lambda p, b: gradients(graph, task, p, {}, {"align": b}, jax.random.key(0), data)
    )(parameters, batch)
    return losses["align"], gradient


def assert_same(first: Gradient, second: Gradient) -> None:
    for a, b in zip(jax.tree.leaves(first[0]), jax.tree.leaves(second[0]), strict=True):
        assert_close(a, b, TERMS)
    for a, b in zip(jax.tree.leaves(first[1]), jax.tree.leaves(second[1]), strict=True):
        # What is summed for a small gradient is as large as for a large one.
        assert_close(a, b, 2 * TERMS, size=max(float(jnp.abs(b).max()), 1.0))


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_pair_that_was_unreadable_is_as_if_not_there(
    model: DualEncoder, batch: dict[str, jax.Array], microbatches: int
) -> None:
    bad = jnp.array([2, 11, 12, 13])
    marked = batch | {
        "images": batch["images"].at[bad].set(0),
        "mask": batch["mask"].at[bad].set(False),
    }
    kept = {name: jnp.delete(a, bad, axis=0) for name, a in batch.items()}
    assert_same(gradient(model, marked, microbatches), gradient(model, kept, 1))


def test_microbatches_change_nothing(model: DualEncoder, batch: dict[str, jax.Array]) -> None:
    whole = gradient(model, batch, 1)
    # A bias of all keys moves no softmax.
    assert all(
        float(jnp.abs(g).max()) > 1e-4
        for name, g in whole[1].items()
        if not name.endswith("key_bias")
    )
    assert_same(whole, gradient(model, batch, 4))


def test_rows_on_eight_devices_are_each_others_negatives(
    model: DualEncoder, batch: dict[str, jax.Array]
) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shared = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    assert_same(gradient(model, batch, 1), gradient(model, shared, 2))


def test_stochastic_depth_draws_anew_in_every_part(batch: dict[str, jax.Array]) -> None:
    """Equal rows in equal places of two parts: only the draws can tell them apart."""
    model = filled_dual_encoder(
        dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, stochastic_depth=0.9))
    )
    equal = batch | {"images": jnp.broadcast_to(batch["images"][:1], batch["images"].shape)}
    task = ContrastiveTask(model.config)
    parts = {name: a[0] for name, a in task.microbatches(equal, 2).items()}
    images = task._encode(model, parts, jax.random.key(0))[0]
    assert float(jnp.abs(images[0::2] - images[1::2]).max()) > 1e-4
    still = task._encode(model, parts, None)[0]
    assert_close(still, jnp.broadcast_to(still[:1], still.shape), TERMS)


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.scale), 4])
def test_two_datasets_at_once_are_compared_apart(
    model: DualEncoder, batch: dict[str, jax.Array], microbatches: int
) -> None:
    graph, parameters = split_model(model)
    task = ContrastiveTask(model.config)
    batches = {
        "align": {name: a[:8] for name, a in batch.items()},
        "ltip": {name: a[4:] for name, a in batch.items()},
    }
    data = {
        "align": DatasetConfig(microbatches=microbatches),
        "ltip": DatasetConfig(microbatches=microbatches, weight=0.5),
    }
    forms = [
        jax.jit(lambda p, b, form=form: form(graph, task, p, {}, b, jax.random.key(0), data)[:2])
        for form in (gradients, dataset_after_dataset)
    ]
    assert_same(*(form(parameters, batches) for form in forms))
