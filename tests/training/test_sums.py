"""Losses are divided once, by the weight of all that was summed, and every part of a step draws
for itself.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flamingo_jax.experiment import (
    AttentionConfig,
    DatasetConfig,
    FeedForwardConfig,
    LanguageModelConfig,
)
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.tasks.flamingo import FlamingoTask
from flamingo_jax.tasks.language_modelling import LanguageModellingTask
from flamingo_jax.tasks.task import Batch, Loss, split_rows
from flamingo_jax.training.state import initial_state, split_model
from flamingo_jax.training.step import gradients, make_update
from tests.models.filling import filled
from tests.training import world
from tests.training.reference import dataset_after_dataset

LENGTH, ROWS = 6, 4
LANGUAGE_MODEL = LanguageModelConfig(
    vocab_size=12,
    layers=1,
    width=8,
    attention=AttentionConfig(heads=2, head_width=4),
    feed_forward=FeedForwardConfig(width=8),
)
FLAMINGO = dataclasses.replace(
    world.FLAMINGO,
    language_model=LANGUAGE_MODEL,
    conditioning=dataclasses.replace(
        world.FLAMINGO.conditioning, heads=1, head_width=4, feed_forward=8
    ),
)


def texts(seed: int, with_targets: list[bool]) -> Batch:
    """Rows of one segment; those that say so have targets, each another number of them."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, LENGTH)
    targets = np.array(with_targets)[:, None] & (np.arange(LENGTH) > np.arange(ROWS)[:, None])
    return {
        "tokens": jnp.asarray(rng.integers(0, 12, shape), jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), shape),
        "segments": jnp.ones(shape, jnp.int32),
        "media_index": jnp.full(shape, -1, jnp.int32),
        "loss_mask": jnp.asarray(targets),
    }


BATCHES = {
    # Of two microbatches, which take every other row, the second has no target.
    "half_empty": texts(0, [True, False, True, False]),
    "empty": texts(1, [False] * ROWS),
}
WEIGHTS = {"half_empty": 0.5, "empty": 2.0}


def written_out(model: Any, *visual: Any) -> float:
    """The weighted sum of each dataset's mean over targets, in float64 and without masks."""
    total, graph = 0.0, nnx.split(model)[0]
    forward = jax.jit(lambda state, *given: nnx.merge(graph, state)(*given))
    for name, batch in BATCHES.items():
        given = [batch[k] for k in ("tokens", "positions", "segments")]
        given += [batch["media_index"], *visual] if visual else []
        logits = np.asarray(forward(nnx.state(model), *given), np.float64)
        found = [
            np.log(np.exp(logits[row, place - 1]).sum()) - logits[row, place - 1, token]
            for row, place in np.argwhere(batch["loss_mask"])
            for token in [int(batch["tokens"][row, place])]
        ]
        total += WEIGHTS[name] * float(np.mean(found)) if found else 0.0
    return total


def summed(form: Any, task: Any, model: Any, parts: int) -> tuple[float, dict[str, jax.Array]]:
    graph, parameters = split_model(model)
    data = {name: DatasetConfig(weight=w, microbatches=parts) for name, w in WEIGHTS.items()}

    def run(parameters: Any, batches: Any) -> Any:
        return form(graph, task, parameters, {}, batches, jax.random.key(0), data)

    losses, gradient, _ = jax.jit(run)(parameters, BATCHES)
    return sum(WEIGHTS[name] * float(loss.value) for name, loss in losses.items()), gradient


def assert_same(ours: Any, theirs: Any) -> None:
    for name, g in theirs.items():
        # What float32's rounding leaves of sums over a few dozen terms.
        np.testing.assert_allclose(ours[name], g, atol=1e-5 * max(1.0, float(jnp.abs(g).max())))


def test_a_language_models_part_without_targets_changes_nothing() -> None:
    model = filled(lambda rngs: LanguageModel(LANGUAGE_MODEL, rngs=rngs))
    task = LanguageModellingTask("token_mean")
    loss, gradient = summed(gradients, task, model, 1)
    np.testing.assert_allclose(loss, written_out(model), rtol=1e-5)
    in_parts, in_sum = summed(gradients, task, model, 2)
    np.testing.assert_allclose(in_parts, loss, rtol=1e-5)
    assert_same(in_sum, gradient)


def test_a_streams_part_without_targets_changes_nothing() -> None:
    model = filled(lambda rngs: Flamingo(FLAMINGO, rngs=rngs))
    task = FlamingoTask("token_mean")
    loss, gradient = summed(gradients, task, model, 1)
    np.testing.assert_allclose(loss, written_out(model, None, None), rtol=1e-5)
    for form in (gradients, dataset_after_dataset):
        in_parts, in_sum = summed(form, task, model, 2)
        np.testing.assert_allclose(in_parts, loss, rtol=1e-5)
        assert_same(in_sum, gradient)


class Noise(nnx.Module):
    """A single parameter."""

    def __init__(self) -> None:
        self.scale = nnx.Param(jnp.ones(()))


class NoiseTask:
    """A task whose loss is a draw, and whose metric is the sum of the draws' squares."""

    def __init__(self, packs: bool = True):
        self.packs = packs

    def weight(self, batch: Batch) -> jax.Array:
        return jnp.float32(1)

    def losses(
        self, model: Noise, batches: dict[str, Batch], key: jax.Array | None
    ) -> dict[str, Loss]:
        assert key is not None
        draw, one = jax.random.normal(key), jnp.float32(1)
        loss = Loss(model.scale[...] * draw, one, {"square": (draw**2, one)})
        return dict.fromkeys(batches, loss)

    def microbatches(self, batch: Batch, count: int) -> Batch:
        return split_rows(batch, count)

    def without_images(self, batch: Batch) -> None:
        return None

    def watch(self, trainable: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {}


def draws(form: str, names: str, parts: int = 1, steps: int = 2) -> list[tuple[float, float]]:
    """(draw, mean of squares) of every dataset, step after step."""
    graph, parameters = split_model(Noise())
    data = {name: DatasetConfig(microbatches=parts) for name in names}
    task = NoiseTask(packs=form == "packed")
    update = jax.jit(make_update(graph, task, optax.identity(), data, form == "round_robin"))
    state, found = initial_state(parameters, optax.identity(), 3), []
    for _ in range(steps):
        # The parameter is not to change what a loss tells of its draw.
        state = state._replace(trainable=parameters)
        state, metrics = update(
            state, {}, {name: {"segments": jnp.zeros((4, 1), jnp.int32)} for name in names}
        )
        found += [(float(metrics[f"loss/{n}"]), float(metrics[f"square/{n}"])) for n in names]
    return found


@pytest.mark.parametrize("form", ["round_robin", "apart"])
def test_every_dataset_and_every_step_draws_anew(form: str) -> None:
    found = [draw for draw, _ in draws(form, "abc")]
    # In round robin the sum of gradients moves the parameter, but not before its dataset's own
    # loss.
    assert len({round(draw, 4) for draw in found}) == 6


def test_a_datasets_draws_do_not_depend_on_its_place_or_company() -> None:
    assert draws("apart", "ab", steps=1) == draws("apart", "ba", steps=1)[::-1]
    alone = draws("apart", "b", steps=1)
    assert alone == draws("apart", "abc", steps=1)[1:2] == draws("packed", "b", steps=1)


@pytest.mark.parametrize("form", ["round_robin", "packed"])
def test_every_microbatch_draws_anew(form: str) -> None:
    """The mean of two draws' squares is the square of their mean for equal draws alone."""
    for mean, square in draws(form, "a", parts=2):
        assert square > mean**2 + 1e-4
