"""The update: gradients of every dataset, weighted and summed, then one step of the optimizer (paper 2.4)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flamingo_jax.experiment import DatasetConfig
from flamingo_jax.tasks.task import Batch, Loss, Task
from flamingo_jax.training.state import Parameters, TrainState, merge_model

Array = jax.Array
Update = Callable[[TrainState, Parameters, dict[str, Batch]], tuple[TrainState, dict[str, Any]]]


def dataset_gradient(
    graph: Any, task: Task, trainable: Parameters, frozen: Parameters, batch: Batch, key: Array, microbatches: int
) -> tuple[Loss, Parameters]:
    """A dataset's loss and the gradient of its total, float32, accumulated over microbatches where there are several."""

    def total(trainable: Parameters, batch: Batch, key: Array) -> tuple[Array, Loss]:
        loss = task.loss(merge_model(graph, trainable, frozen), batch, key)
        return loss.total, loss

    gradient = jax.grad(total, has_aux=True)
    if microbatches == 1:
        grads, loss = gradient(trainable, batch, key)
        return loss, grads

    def add(carry: Any, inputs: Any) -> tuple[Any, None]:
        part, key = inputs
        grads, loss = gradient(trainable, part, key)
        return jax.tree.map(jnp.add, carry, (loss, grads)), None

    parts = task.microbatches(batch, microbatches)
    keys = jax.random.split(key, jax.tree.leaves(parts)[0].shape[0])
    shapes = jax.eval_shape(gradient, trainable, jax.tree.map(lambda a: a[0], parts), keys[0])
    grads_shape, loss_shape = shapes
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (loss_shape, grads_shape))
    (loss, grads), _ = jax.lax.scan(add, zeros, (parts, keys))
    return loss, grads


def make_update(
    graph: Any, task: Task, optimizer: optax.GradientTransformation, datasets: Mapping[str, DatasetConfig], mode: str = "accumulate"
) -> Update:
    """The jittable update (state, frozen, {dataset: batch}) -> (state, metrics).

    gradient = sum over datasets m of lambda_m * d(total_m) / weight_m. A step whose losses or gradient are not finite leaves
    parameters, moments and the optimizer's count as they were, and is counted. `mode` "round_robin" (the paper's ablation) makes one
    optimizer step per dataset instead.

    metrics: {"loss", "loss/<dataset>", "<metric>/<dataset>", "gradient_norm", "finite/<dataset>", "skipped", "skipped_in_a_row"}.
    """

    def losses_and_gradients(state: TrainState, frozen: Parameters, batches: dict[str, Batch], names: list[str]) -> Any:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        metrics: dict[str, Any] = {"loss": jnp.float32(0)}
        gradient: Parameters | None = None
        for number, name in enumerate(names):
            config = datasets[name]
            loss, grads = dataset_gradient(
                graph, task, state.trainable, frozen, batches[name], jax.random.fold_in(key, number), config.microbatches
            )
            value = loss.total / loss.weight
            metrics["loss"] += config.weight * value
            metrics[f"loss/{name}"] = value
            metrics |= {f"{metric}/{name}": a / jnp.maximum(b, 1e-9) for metric, (a, b) in loss.metrics.items()}
            scale = config.weight / loss.weight
            gradient = (
                {k: scale * g.astype(jnp.float32) for k, g in grads.items()}
                if gradient is None
                else {k: gradient[k] + scale * g.astype(jnp.float32) for k, g in grads.items()}
            )
        return metrics, gradient

    def apply(state: TrainState, metrics: dict[str, Any], gradient: Parameters, names: list[str]) -> tuple[TrainState, dict[str, Any]]:
        norm = optax.global_norm(gradient)
        metrics["gradient_norm"] = norm
        metrics |= {f"finite/{name}": jnp.isfinite(metrics[f"loss/{name}"]) for name in names}
        finite = jnp.isfinite(norm)
        for name in names:
            finite &= metrics[f"finite/{name}"]
        # Masked before the arithmetic: 0 x NaN is NaN.
        safe = {k: jnp.where(finite, g, 0.0) for k, g in gradient.items()}
        updates, moments = optimizer.update(safe, state.optimizer, state.trainable)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        trainable = keep(optax.apply_updates(state.trainable, updates), state.trainable)
        skip = (~finite).astype(jnp.int32)
        state = state._replace(
            trainable=trainable,
            optimizer=keep(moments, state.optimizer),
            skipped=state.skipped + skip,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * skip,
        )
        return state, metrics

    def update(state: TrainState, frozen: Parameters, batches: dict[str, Batch]) -> tuple[TrainState, dict[str, Any]]:
        names = list(datasets)
        groups = [names] if mode == "accumulate" else [[name] for name in names]
        metrics: dict[str, Any] = {}
        for group in groups:
            part, gradient = losses_and_gradients(state, frozen, batches, group)
            state, part = apply(state, part, gradient, group)
            metrics |= part | {"loss": metrics.get("loss", 0.0) + part["loss"]}
        metrics |= task.watch(state.trainable) | {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
        return state._replace(step=state.step + 1), metrics

    return update


def lower_update(update: Update, state: Any, frozen: Any, batches: Any) -> jax.stages.Lowered:
    """The update ready to be compiled for arrays, or shapes with shardings, like these; it takes over the state's memory."""
    shardings = jax.tree.map(lambda a: a.sharding, state)
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None)).lower(state, frozen, batches)


def make_held_out_loss(graph: Any, task: Task) -> Callable[..., Loss]:
    """The jittable loss (trainable, frozen, batch) -> Loss of one held-out batch."""
    return lambda trainable, frozen, batch: task.loss(merge_model(graph, trainable, frozen), batch, None)
