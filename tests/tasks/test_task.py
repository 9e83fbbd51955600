"""The token loss against numpy written token by token, and parts of a batch against the whole."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.experiment import (
    AttentionConfig,
    ConditioningConfig,
    FeedForwardConfig,
    FlamingoConfig,
    LanguageModelConfig,
    MeshConfig,
    ResamplerConfig,
    VisionConfig,
)
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.partitioning.host_shard import HostShard
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.tasks.flamingo import FlamingoTask, drop_blanks, mask_unreadable
from flamingo_jax.tasks.language_modelling import LanguageModellingTask
from flamingo_jax.tasks.task import Loss
from flamingo_jax.tasks.token_loss import target_mask
from flamingo_jax.training.prefetcher import shard_batch
from tests.models.filling import filled
from tests.rounding import assert_close
from tests.tasks.logits import token_loss

VOCABULARY = 7
RNG = np.random.default_rng(0)
SUM = VOCABULARY + 2 * 4 * 8
"""Terms of a loss: a softmax over the vocabulary, and the targets of four rows of 8 tokens."""
TERMS = 160 + 3 * (16 + 8 + 8 + 16 + 8 + 16 + 8 + 12) + 16 + 8
"""Terms of the model below: the map from features, a layer each of resampler, gated block and
language model, the head.
"""
SEGMENTS = np.array(
    [
        [1, 1, 1, 1, 2, 2, 2, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 2, 2, 3, 3, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
    ]
)
"""Seven sequences in four rows."""
TOKENS = RNG.integers(0, VOCABULARY, SEGMENTS.shape)
LOSS_MASK = RNG.random(SEGMENTS.shape) < 0.7
LOGITS = RNG.standard_normal((*SEGMENTS.shape, VOCABULARY)) * 2
LOSS_MASK[0, 4] = LOSS_MASK[0, 7] = LOSS_MASK[2, 2] = (
    True  # First of a segment, and padding: no targets, whatever the mask says.
)


def as_batch(
    tokens: np.ndarray = TOKENS,
    segments: np.ndarray = SEGMENTS,
    loss_mask: np.ndarray = LOSS_MASK,
) -> dict[str, jax.Array]:
    return {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "segments": jnp.asarray(segments, jnp.int32),
        "loss_mask": jnp.asarray(loss_mask),
    }


def is_target(row: int, place: int) -> bool:
    return bool(
        place > 0
        and LOSS_MASK[row, place]
        and SEGMENTS[row, place] > 0
        and SEGMENTS[row, place] == SEGMENTS[row, place - 1]
    )


@pytest.mark.parametrize("reduction", ["sequence_sum", "token_mean"])
def test_equals_the_sum_written_out(reduction: str) -> None:
    losses, hits = [], 0
    for row, place in np.ndindex(*SEGMENTS.shape):
        if is_target(row, place):
            scores = LOGITS[row, place - 1]
            losses.append(-np.log(np.exp(scores[TOKENS[row, place]]) / np.exp(scores).sum()))
            hits += int(scores.argmax() == TOKENS[row, place])
    loss = token_loss(jnp.asarray(LOGITS, jnp.float32), as_batch(), reduction)
    expected = sum(losses) / (7 if reduction == "sequence_sum" else len(losses))
    assert_close(loss.total / loss.weight, expected, SUM)
    assert_close(loss.metrics["loss_per_token"], (sum(losses), len(losses)), SUM)
    np.testing.assert_array_equal(loss.metrics["accuracy"], (hits, len(losses)))


def test_only_targets_and_the_logits_before_them_count() -> None:
    """Padding, image tags and the first token of a segment are predicted by nobody: the
    gradient there is exactly zero.
    """
    slope = np.asarray(
        jax.grad(lambda logits: token_loss(logits, as_batch(), "token_mean").total)(
            jnp.asarray(LOGITS, jnp.float32)
        )
    )
    predicts = np.array(
        [[place + 1 < 8 and is_target(row, place + 1) for place in range(8)] for row in range(4)]
    )
    np.testing.assert_array_equal(np.abs(slope).max(-1) > 0, predicts)
    untargeted = np.array([[not is_target(row, place) for place in range(8)] for row in range(4)])
    other = np.where(untargeted, (TOKENS + 1) % VOCABULARY, TOKENS)
    first, second = (
        token_loss(jnp.asarray(LOGITS, jnp.float32), as_batch(tokens), "token_mean").total
        for tokens in (TOKENS, other)
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("reduction", ["sequence_sum", "token_mean"])
def test_a_batch_of_padding_weighs_nothing(reduction: str) -> None:
    loss = token_loss(
        jnp.asarray(LOGITS, jnp.float32), as_batch(segments=np.zeros_like(SEGMENTS)), reduction
    )
    assert (float(loss.total), float(loss.weight), float(loss.value)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("reduction", ["sequence_sum", "token_mean"])
def test_parts_sum_to_the_whole(reduction: str) -> None:
    parts = LanguageModellingTask(reduction).microbatches(as_batch(), 2)
    logits = jnp.asarray(LOGITS, jnp.float32)
    halves = [
        token_loss(logits[i::2], {name: a[i] for name, a in parts.items()}, reduction)
        for i in range(2)
    ]
    jax.tree.map(
        lambda whole, a, b: assert_close(whole, a + b, SUM),
        token_loss(logits, as_batch(), reduction),
        *halves,
    )


CONFIG = FlamingoConfig(
    vision=VisionConfig(variant="tiny", image_size=48),
    language_model=LanguageModelConfig(
        vocab_size=VOCABULARY - 1,
        layers=1,
        width=8,
        attention=AttentionConfig(heads=2, head_width=4),
        feed_forward=FeedForwardConfig(width=12),
    ),
    resampler=ResamplerConfig(
        layers=1, width=8, heads=2, head_width=4, latents=2, frames=1, feed_forward=12
    ),
    conditioning=ConditioningConfig(
        heads=2,
        head_width=4,
        feed_forward=12,
    ),
)


def flamingo_batch() -> dict[str, jax.Array]:
    """Two visuals a row, the third row with one and the fourth with none."""
    visuals = jnp.array([[0, 1], [2, 3], [4, -1], [-1, -1]], jnp.int32)
    return as_batch() | {
        "positions": jnp.asarray(
            [[int((row[:i] == row[i]).sum()) for i in range(8)] for row in SEGMENTS], jnp.int32
        ),
        "media_index": jnp.asarray(
            [[0] * 4 + [1] * 4, [-1] * 2 + [0] * 3 + [1] * 3, [0] * 8, [-1] * 8], jnp.int32
        ),
        "visuals": visuals,
        "frame_mask": jnp.repeat((visuals >= 0).reshape(-1, 1), 1, axis=1),
        "features": jnp.asarray(RNG.standard_normal((8, 1, 4, 160)), jnp.float32),
    }


def test_visuals_count_from_the_start_of_their_part() -> None:
    batch = flamingo_batch()
    parts = FlamingoTask().microbatches(batch, 2)
    np.testing.assert_array_equal(parts["visuals"], [[[0, 1], [2, -1]], [[0, 1], [-1, -1]]])
    np.testing.assert_array_equal(
        parts["features"][0, parts["visuals"][0, 1, 0]],
        batch["features"][batch["visuals"][2, 0]],
    )
    np.testing.assert_array_equal(parts["tokens"][0, 1], batch["tokens"][2])


def test_parts_of_pages_lose_as_the_whole_does() -> None:
    graph, state = nnx.split(filled(lambda rngs: Flamingo(CONFIG, rngs=rngs)))
    loss = jax.jit(
        lambda state, batch: FlamingoTask().losses(nnx.merge(graph, state), {"": batch}, None)[""]
    )
    batch = flamingo_batch()
    parts = FlamingoTask().microbatches(batch, 2)
    whole, halves = (
        loss(state, batch),
        [loss(state, {name: a[i] for name, a in parts.items()}) for i in range(2)],
    )
    jax.tree.map(lambda w, a, b: assert_close(w, a + b, SUM + TERMS), whole, *halves)
    blind = loss(state, FlamingoTask().without_images(batch))
    assert abs(float(blind.total - whole.total)) > 1e-3


def looked_at_and_lost() -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """A batch of which three visuals could not be read, and what a host would make of it that
    knew: every segment that looks at one of them has nothing to learn and nothing to see.
    """
    visuals = np.arange(8).reshape(4, 2)
    batch = flamingo_batch() | {
        "visuals": jnp.asarray(visuals, jnp.int32),
        # Two questions about one visual, and a page with one of two lost; a row whose lost
        # visual nobody looks at; padding.
        "media_index": jnp.asarray(
            [
                [0, 0, 0, 0, 0, 0, 0, -1],
                [-1, 0, 0, 0, 1, 1, 1, 1],
                [-1, -1, 0, 0, 1, 1, -1, -1],
                [0] * 3 + [-1] * 5,
            ],
            jnp.int32,
        ),
        "loss_mask": jnp.ones((4, 8), bool),
    }
    lost = [0, 3, 7]
    batch["frame_mask"] = jnp.ones((8, 1), bool).at[jnp.array(lost), 0].set(False)
    known = {name: np.array(batch[name]) for name in ("loss_mask", "media_index", "visuals")}
    for row, place in np.ndindex(4, 2):
        if visuals[row, place] in lost:
            known["visuals"][row, place] = -1
            for segment in range(1, 9):
                inside = SEGMENTS[row] == segment
                if (np.asarray(batch["media_index"])[row][inside] == place).any():
                    known["loss_mask"][row][inside], known["media_index"][row][inside] = (
                        False,
                        -1,
                    )
    return batch, batch | {name: jnp.asarray(value) for name, value in known.items()}


def test_what_looks_at_a_visual_that_could_not_be_read_is_masked_whole() -> None:
    batch, known = looked_at_and_lost()
    found = mask_unreadable(batch)
    for name in batch:
        np.testing.assert_array_equal(found[name], known[name], err_msg=name)
    rest = np.asarray(found["loss_mask"]).any(1).tolist()
    assert rest == [True, False, True, True], "padding is no target whatever its mask says"
    for name, value in mask_unreadable(found).items():
        np.testing.assert_array_equal(value, found[name])


@pytest.mark.parametrize("company, reduction", [(False, "sequence_sum"), (True, "token_mean")])
def test_losses_and_gradients_are_those_of_rows_made_without_it(
    company: bool, reduction: str
) -> None:
    """Alone and with another dataset, in parts, and with every image taken away; whatever stands
    where the visual would have stood.
    """
    batch, known = looked_at_and_lost()
    known["features"] = jnp.where(batch["frame_mask"][..., None, None], batch["features"], 0.0)
    task = FlamingoTask(reduction)
    graph, state = nnx.split(filled(lambda rngs: Flamingo(CONFIG, rngs=rngs)))

    def total(state: nnx.State, batch: dict[str, jax.Array]) -> tuple[jax.Array, Loss]:
        loss = task.losses(nnx.merge(graph, state), {"seen": batch}, None)["seen"]
        return loss.total, loss

    def in_company(state: nnx.State, batch: dict[str, jax.Array]) -> tuple[jax.Array, Loss]:
        text = {
            name: batch[name]
            for name in ("tokens", "positions", "segments", "media_index", "loss_mask")
        }
        loss = task.losses(
            nnx.merge(graph, state),
            {"seen": batch, "text": text | {"media_index": jnp.full((4, 8), -1)}},
            None,
        )["seen"]
        return loss.total, loss

    def close(a: Any, b: Any) -> None:
        assert_close(a, b, 2 * TERMS + SUM, size=max(1.0, float(jnp.abs(b).max())))

    slope = jax.jit(jax.grad(in_company if company else total, has_aux=True))
    found, expected = slope(state, batch), slope(state, known)
    jax.tree.map(close, found, expected)
    assert (
        float(found[1].metrics["loss_per_token"][1])
        == target_mask(known).sum()
        < target_mask(batch).sum()
    )
    np.testing.assert_array_equal(task.weight(batch), task.weight(known))
    parts, expected_parts = task.microbatches(batch, 2), task.microbatches(known, 2)
    for name in set(parts) - {"features"}:
        np.testing.assert_array_equal(parts[name], expected_parts[name])
    blind, expected_blind = task.without_images(batch), task.without_images(known)
    assert (
        blind.keys()
        == expected_blind.keys()
        == {"tokens", "positions", "segments", "media_index", "loss_mask"}
    )
    jax.tree.map(np.testing.assert_array_equal, blind, expected_blind)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)])
def test_lists_filled_up_for_the_mesh_are_those_of_rows(shape: tuple[int, int, int]) -> None:
    """Three visuals a row shard, or six, over two devices or four."""
    mesh = make_mesh(MeshConfig(*shape))
    host_shard = HostShard.of(mesh)
    real = np.random.default_rng(0).integers(0, 256, (12, 2, 4), np.uint8)
    listed = host_shard.visuals(4, 3)
    assert (listed < 0).any()
    mask = np.array(real[..., 0] > 100)
    batch = {
        "images": np.where(listed[:, None, None] >= 0, real[listed], 0),
        "frame_mask": np.where(listed[:, None] >= 0, mask[listed], False),
        "visuals": np.arange(12, dtype=np.int32).reshape(4, 3),
    }
    with jax.set_mesh(mesh):
        found = jax.jit(drop_blanks)(shard_batch(batch, mesh))
    np.testing.assert_array_equal(found["images"], real)
    np.testing.assert_array_equal(found["frame_mask"], mask)


def test_watched_gates_are_those_of_every_block() -> None:
    gates = {
        "gated_xattn/layers/attention_gate": jnp.array([0.0, 0.5]),
        "gated_xattn/layers/dense_gate": jnp.array([1.0, -2.0]),
    }
    watched = FlamingoTask().watch(gates)
    assert_close(watched["gates/attention"], np.tanh([0, 0.5]), terms=4)
    assert_close(watched["gates/dense"], np.tanh([1, -2]), terms=4)
