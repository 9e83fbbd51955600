"""The update against the paper's equation written out by hand, one sequence at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental.layout import Format, Layout

from flamingo_jax.tasks import stages
from flamingo_jax.training.optimizer import make_optimizer
from flamingo_jax.training.state import TrainState, initial_state, merge_model, split_model
from flamingo_jax.training.step import Gradients, gradients, laid_out, make_update
from tests.training import world
from tests.training.reference import dataset_after_dataset

EXPERIMENT = world.experiment()
COMPILED: dict[Any, Any] = {}
"""Updates by their options, since compiling is most of the time here."""


@pytest.fixture(scope="module")
def parts() -> tuple[Any, dict[str, jax.Array], dict[str, jax.Array]]:
    graph, parameters = split_model(
        stages.build_model(EXPERIMENT, nnx.Rngs(params=jax.random.key(3)))
    )
    for gate in ("attention_gate", "dense_gate"):
        parameters[f"gated_xattn/layers/{gate}"] = jnp.full((2,), 0.5, jnp.float32)
    frozen = {
        name: value
        for name, value in parameters.items()
        if name.startswith(("vision_encoder", "language_model"))
    }
    return (
        graph,
        {name: value for name, value in parameters.items() if name not in frozen},
        frozen,
    )


@pytest.fixture(scope="module")
def updated(parts: Any) -> tuple[TrainState, dict[str, Any]]:
    return run(parts, EXPERIMENT.data)


def run(
    parts: Any, data: Any, batches: Any = None, state: TrainState | None = None, **options: Any
) -> Any:
    graph, trainable, frozen = parts
    optimizer = make_optimizer(EXPERIMENT.optimizer, 6, trainable)
    key = (*data.items(), *options.items())
    if key not in COMPILED:
        COMPILED[key] = jax.jit(
            make_update(graph, stages.make_task(EXPERIMENT), optimizer, data, **options)
        )
    return COMPILED[key](
        state or initial_state(trainable, optimizer, 0), frozen, batches or world.batches()
    )


def alone(values: np.ndarray, here: np.ndarray, fill: int) -> np.ndarray:
    """One segment of a row as a row of its own: what is elsewhere in the row becomes padding
    after it.
    """
    return np.concatenate([values[here], np.full((~here).sum(), fill, values.dtype)])


def test_the_update_is_the_papers_equation(parts: Any, updated: Any) -> None:
    """sum over datasets of lambda * mean over sequences of - sum over tokens of log p,
    differentiated whole, then AdamW.
    """
    graph, trainable, frozen = parts

    def objective(trainable: Any) -> jax.Array:
        model = merge_model(graph, trainable, frozen)
        total = jnp.float32(0)
        for name, data in world.batches().items():
            visual_tokens = model.encode_visuals(data["images"], data["frame_mask"])
            # Every sequence as a row of its own.
            places = [
                (row, segment)
                for row in range(len(data["tokens"]))
                for segment in range(1, data["segments"][row].max() + 1)
            ]
            fills = {
                "tokens": 0,
                "positions": 0,
                "segments": 0,
                "loss_mask": 0,
                "media_index": -1,
            }
            rows = {
                part: np.stack(
                    [alone(data[part][r], data["segments"][r] == s, fill) for r, s in places]
                )
                for part, fill in fills.items()
            }
            visuals = data["visuals"][[r for r, _ in places]]
            logits = model(
                rows["tokens"],
                rows["positions"],
                rows["segments"],
                rows["media_index"],
                visual_tokens,
                visuals,
            )
            log_p = jnp.take_along_axis(
                jax.nn.log_softmax(logits[:, :-1]), rows["tokens"][:, 1:, None], axis=-1
            )[..., 0]
            likelihoods = jnp.sum(log_p * rows["loss_mask"][:, 1:], axis=1)
            total += world.DATA[name].weight * -jnp.mean(likelihoods)
        return total

    loss, gradient = jax.jit(jax.value_and_grad(objective))(trainable)
    state, metrics = updated
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.global_norm(gradient), rtol=1e-4)
    optimizer = make_optimizer(EXPERIMENT.optimizer, 6, trainable)
    updates, moments = optimizer.update(gradient, optimizer.init(trainable), trainable)
    for ours, theirs in zip(
        jax.tree.leaves(state.optimizer), jax.tree.leaves(moments), strict=True
    ):
        np.testing.assert_allclose(
            ours, theirs, rtol=1e-3, atol=1e-6 * float(np.abs(theirs).max()) + 1e-9
        )


def gradient_by(form: Any, parts: Any, data: Any) -> Gradients:
    graph, trainable, frozen = parts
    task, key = stages.make_task(EXPERIMENT), jax.random.key(0)
    run = jax.jit(
        lambda trainable, frozen, batches: form(graph, task, trainable, frozen, batches, key, data)
    )
    return run(trainable, frozen, world.batches())


@pytest.fixture(scope="module")
def reference(parts: Any) -> Gradients:
    return gradient_by(dataset_after_dataset, parts, EXPERIMENT.data)


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.scale)])
def test_a_stream_of_all_datasets_gives_the_same_gradient(
    parts: Any, reference: Gradients, apart: bool
) -> None:
    """In microbatches, as many for all datasets or not: then there are two streams."""
    data = {
        name: dataclasses.replace(dataset, microbatches=1 if apart and name == "vtp" else 2)
        for name, dataset in EXPERIMENT.data.items()
    }
    found = gradient_by(gradients, parts, data)
    assert set(found.norms) == ({"vtp"} if apart else set())
    for name, norm in found.norms.items():
        np.testing.assert_allclose(norm, reference.norms[name], rtol=2e-5)
    for a, b in zip(jax.tree.leaves(found.losses), jax.tree.leaves(reference.losses), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)
    for name, expected in reference.gradient.items():
        most = float(jnp.abs(expected).max())
        np.testing.assert_allclose(
            found.gradient[name], expected, rtol=1e-3, atol=2e-6 * most + 1e-9, err_msg=name
        )


def test_a_step_that_is_not_finite_changes_nothing_but_counts(parts: Any, updated: Any) -> None:
    graph, trainable, frozen = parts
    broken = frozen | {
        "language_model/embedding": frozen["language_model/embedding"].at[7].set(jnp.nan)
    }
    batches = world.batches()
    batches = {
        name: (
            data
            | {"tokens": np.where(data["tokens"] == 7, 7 if name == "vtp" else 8, data["tokens"])}
        )
        for name, data in batches.items()
    }
    before = updated[0]
    state, metrics = run((graph, trainable, broken), EXPERIMENT.data, batches, before)
    assert int(state.step) == 2 and int(state.skipped) == 1 and int(state.skipped_in_a_row) == 1
    for new, old in zip(
        jax.tree.leaves((state.trainable, state.optimizer)),
        jax.tree.leaves((before.trainable, before.optimizer)),
        strict=True,
    ):
        np.testing.assert_array_equal(new, old)
    # The tied output table is broken for every dataset, so all are named.
    assert not any(bool(metrics[f"finite/{name}"]) for name in EXPERIMENT.data)
    state, _ = run(parts, EXPERIMENT.data, None, state)
    assert int(state.skipped) == 1 and int(state.skipped_in_a_row) == 0


def test_round_robin_makes_one_optimizer_step_per_dataset(parts: Any, reference: Gradients) -> None:
    two = ("ltip", "vtp")
    data = {name: EXPERIMENT.data[name] for name in two}
    state, metrics = run(
        parts, data, {name: world.batches()[name] for name in two}, round_robin=True
    )
    counts = [int(leaf) for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim == 0]
    assert counts and set(counts) == {2} and int(state.step) == 1
    assert metrics["loss"] > metrics["loss/vtp"] * 0.03
    apart = [float(metrics[f"gradient_norm/{name}"]) for name in two]
    assert min(apart) > 0 and float(metrics["gradient_norm"]) == max(apart)
    # The first dataset meets the parameters that all meet where their gradients are summed.
    np.testing.assert_allclose(apart[0], reference.norms["ltip"], rtol=1e-5)


def test_round_robin_counts_a_step_that_any_dataset_spoils(parts: Any) -> None:
    graph, trainable, frozen = parts
    broken = frozen | {
        "language_model/embedding": frozen["language_model/embedding"].at[7].set(jnp.nan)
    }
    data = {name: EXPERIMENT.data[name] for name in ("vtp", "ltip")}
    state, metrics = run(
        (graph, trainable, broken),
        data,
        {name: world.batches()[name] for name in data},
        round_robin=True,
    )
    assert (
        int(state.skipped) >= 1
        and int(state.skipped_in_a_row) == 1
        and int(metrics["skipped_in_a_row"]) == 1
    )


def test_frozen_parameters_are_laid_out_as_the_compiled_update_takes_them() -> None:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    columns = Format(Layout((1, 0)), here)
    shape = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    compiled = (
        jax.jit(
            lambda state, frozen, batches: frozen["w"] @ frozen["v"].T,
            in_shardings=(None, {"w": columns, "v": here}, None),
        )
        .lower(0.0, {"w": shape, "v": shape}, 0.0)
        .compile()
    )
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    placed = laid_out(
        compiled, {"w": jax.device_put(values, here), "v": jax.device_put(values, here)}
    )
    assert placed["w"].format.layout.major_to_minor == (1, 0)
    np.testing.assert_array_equal(compiled(0.0, placed, 0.0), values @ values.T)
    # Whatever else takes them takes them so.
    np.testing.assert_array_equal(jax.jit(lambda w: 2 * w)(placed["w"]), 2 * values)
    np.testing.assert_array_equal(laid_out(compiled, placed)["v"], values)
