"""The training step: the gradients of all datasets, weighted and summed, then one optimizer
update (paper 2.4); and how it is compiled.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Format, Layout

from flamingo_jax.experiment import DatasetConfig
from flamingo_jax.tasks.flops import work_in
from flamingo_jax.tasks.task import Batch, Loss, Task, divisor
from flamingo_jax.training.state import Parameters, TrainState, merge_model

Array = jax.Array
Update = Callable[[TrainState, Parameters, dict[str, Batch]], tuple[TrainState, dict[str, Any]]]


class Gradients(NamedTuple):
    """The gradient of a step.

    losses: each dataset's.
    gradient: float32, of the weighted sum of the losses.
    norms: the norm of each dataset's term of the gradient, for datasets that go through the
      model alone; those in one stream have only a common gradient.
    """

    losses: dict[str, Loss]
    gradient: Parameters
    norms: dict[str, Array]


def gradients(
    graph: Any,
    task: Task,
    trainable: Parameters,
    frozen: Parameters,
    batches: Mapping[str, Batch],
    key: Array,
    datasets: Mapping[str, DatasetConfig],
) -> Gradients:
    """Computes the gradient of sum over datasets m of lambda_m * total_m / weight_m, in
    float32.

    Datasets that are packed into one stream (`streams`) share a forward and a backward pass,
    whose loss is their weighted sum; streams run one after the other, and their gradients are
    added.

    Args:
      graph: the model's static graph, see `merge_model`.
      key: the step's PRNG key.
      datasets: config of each dataset; its `weight` is lambda_m.
    """
    weights = {name: task.weight(batch) for name, batch in batches.items()}
    scales = {name: datasets[name].weight / divisor(weight) for name, weight in weights.items()}

    def total(
        trainable: Parameters, part: dict[str, Batch], key: Array
    ) -> tuple[Array, dict[str, Loss]]:
        losses = task.losses(merge_model(graph, trainable, frozen), part, key)
        scaled = (scales[name] * loss.total for name, loss in losses.items())
        return sum(scaled, jnp.float32(0)), losses

    found = Gradients({}, {}, {})
    for names in streams(task, {name: datasets[name] for name in batches}):
        part = {name: batches[name] for name in names}
        losses, grads = _over_microbatches(
            task,
            jax.grad(total, has_aux=True),
            trainable,
            part,
            # One key for the stream: its datasets are one batch to the model.
            dataset_key(key, *names),
            datasets[names[0]].microbatches,
        )
        gradient = {name: g.astype(jnp.float32) for name, g in grads.items()}
        norms = {name: optax.global_norm(gradient) for name in names} if len(names) == 1 else {}
        if found.gradient:
            gradient = jax.tree.map(jnp.add, found.gradient, gradient)
        found = Gradients(found.losses | losses, gradient, found.norms | norms)
    return found._replace(losses={name: found.losses[name] for name in batches})


def streams(task: Task, datasets: Mapping[str, DatasetConfig]) -> list[list[str]]:
    """Groups the datasets that go through the model together: those with the same number of
    microbatches, if the task packs datasets; else each alone.
    """
    if not task.packs:
        return [[name] for name in datasets]
    found: dict[int, list[str]] = {}
    for name, config in datasets.items():
        found.setdefault(config.microbatches, []).append(name)
    return list(found.values())


def dataset_key(key: Array, *names: str) -> Array:
    """Derives a key from the step's for these datasets, independent of the other datasets and
    their order.
    """
    return jax.random.fold_in(key, zlib.crc32("\n".join(names).encode()))


def _over_microbatches(
    task: Task,
    gradient: Callable[..., Any],
    trainable: Parameters,
    batches: dict[str, Batch],
    key: Array,
    count: int,
) -> tuple[Any, Parameters]:
    """Computes `gradient(trainable, batches, key) -> (gradient, losses)` for `count`
    microbatches, one after the other -> the sums (losses, gradient).
    """
    if count == 1:
        grads, losses = gradient(trainable, batches, key)
        return losses, grads
    parts = {name: task.microbatches(batch, count) for name, batch in batches.items()}
    keys = jax.random.split(key, jax.tree.leaves(parts)[0].shape[0])

    def of(part: Any) -> tuple[Any, Parameters]:
        batch, key = part
        grads, losses = gradient(trainable, batch, key)
        return losses, grads

    return scan_sum(of, (parts, keys))


def scan_sum(function: Callable[[Any], Any], parts: Any) -> Any:
    """Sums `function(part)` over parts stacked on the first axis, one at a time."""
    # The accumulators' shapes come from an abstract call on the first part.
    shapes = jax.eval_shape(function, jax.tree.map(lambda a: a[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(carry: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, function(part)), None

    return jax.lax.scan(add, zeros, parts)[0]


def make_update(
    graph: Any,
    task: Task,
    optimizer: optax.GradientTransformation,
    datasets: Mapping[str, DatasetConfig],
    round_robin: bool = False,
    gradient_shardings: Mapping[str, jax.sharding.NamedSharding] | None = None,
    schedule: Callable[[Array], Array] | None = None,
) -> Update:
    """Makes the update, a function (state, frozen, {dataset: batch}) -> (state, metrics) to be
    jitted.

    A step whose losses or gradient are not finite changes neither parameters nor moments nor
    the optimizer's count; it is counted in `skipped`.

    Args:
      round_robin: an optimizer step for each dataset, one after the other, instead of one for
        the sum of their gradients.
      gradient_shardings: those that the gradient is reduced to; by default the compiler's.
      schedule: the optimizer's learning rate schedule, for the metrics.

    Metrics, all on the devices:
      loss, loss/<dataset>: the weighted sum, and each dataset's.
      <metric>/<dataset>: what the task measures besides.
      gradient_norm: before clipping; under round_robin the largest of the datasets'.
      gradient_norm/<dataset>: of lambda_m * d(total_m) / weight_m, where known (`Gradients`).
      learning_rate: of this step's update.
      finite/<dataset>: bool.
      skipped, skipped_in_a_row: steps that were not finite.
      work: int32 [4], the batches' `tasks.flops.Work`, over all devices.
    """

    def losses_and_gradient(
        state: TrainState, frozen: Parameters, batches: dict[str, Batch]
    ) -> tuple[dict[str, Any], Parameters]:
        # The step's key: resuming at a step repeats its randomness.
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        found = gradients(graph, task, state.trainable, frozen, batches, key, datasets)
        if gradient_shardings is not None:
            found = found._replace(
                gradient=jax.lax.with_sharding_constraint(found.gradient, dict(gradient_shardings))
            )
        return _loss_metrics(found, datasets), found.gradient

    def update(
        state: TrainState, frozen: Parameters, batches: dict[str, Batch]
    ) -> tuple[TrainState, dict[str, Any]]:
        groups = [[name] for name in datasets] if round_robin else [list(datasets)]
        metrics: dict[str, Any] = {}
        skipped_before = state.skipped
        for group in groups:
            part, gradient = losses_and_gradient(
                state, frozen, {name: batches[name] for name in group}
            )
            if schedule is not None:
                # The optimizer's own count, which skipped steps do not advance.
                part["learning_rate"] = schedule(
                    optax.tree.get_all_with_path(state.optimizer, "count")[0][1]
                )
            # The norm is finite only if every element of the gradient is.
            finite = jnp.isfinite(part["gradient_norm"])
            for name in group:
                finite &= part[f"finite/{name}"]
            state = _optimizer_step(optimizer, state, gradient, finite)
            before = metrics.get("loss", 0.0), metrics.get("gradient_norm", 0.0)
            metrics |= part | {
                "loss": before[0] + part["loss"],
                "gradient_norm": jnp.maximum(before[1], part["gradient_norm"]),
            }
        in_a_row = jnp.where(state.skipped > skipped_before, state.skipped_in_a_row + 1, 0)
        work = [jnp.asarray(count, jnp.int32) for count in work_in(batches.values())]
        metrics |= task.watch(state.trainable) | {
            "skipped": state.skipped,
            "skipped_in_a_row": in_a_row,
            "work": jnp.stack(work),
        }
        return state._replace(step=state.step + 1, skipped_in_a_row=in_a_row), metrics

    return update


def _loss_metrics(found: Gradients, datasets: Mapping[str, DatasetConfig]) -> dict[str, Any]:
    """Collects the metrics of one gradient: losses, the task's own metrics, norms."""
    metrics: dict[str, Any] = {"loss": jnp.float32(0)} | {
        f"gradient_norm/{name}": norm for name, norm in found.norms.items()
    }
    for name, loss in found.losses.items():
        metrics["loss"] += datasets[name].weight * loss.value
        metrics[f"loss/{name}"] = loss.value
        metrics[f"finite/{name}"] = jnp.isfinite(loss.value)
        for metric, (total, weight) in loss.metrics.items():
            metrics[f"{metric}/{name}"] = total / jnp.maximum(weight, 1e-9)
    return metrics | {"gradient_norm": optax.global_norm(found.gradient)}


def _optimizer_step(
    optimizer: optax.GradientTransformation, state: TrainState, gradient: Parameters, finite: Array
) -> TrainState:
    """Applies one optimizer step where `finite`; otherwise leaves parameters and moments as
    they are and counts a skipped step. The device decides, so that the host does not wait.
    """
    # Masked before the arithmetic: 0 x NaN is NaN.
    safe = {name: jnp.where(finite, g, 0.0) for name, g in gradient.items()}
    updates, moments = optimizer.update(safe, state.optimizer, state.trainable)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    return state._replace(
        trainable=keep(optax.apply_updates(state.trainable, updates), state.trainable),
        optimizer=keep(moments, state.optimizer),
        skipped=state.skipped + (~finite).astype(jnp.int32),
    )


TPU_OPTIONS: dict[str, str | bool] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
"""Turns XLA's windowed einsum ("collective matmul") off. It splits a product whose weight is
all-gathered, or whose result is reduce-scattered, into a loop over the devices' shards. Here
the loops' small products take several times the compiler's estimated cycles of the whole
product, and most of the compile time.
"""


def trace_update(update: Update, state: Any, frozen: Any, batches: Any) -> jax.stages.Traced:
    """Traces the update for arrays (or ShapeDtypeStructs with shardings) like these. The
    compiled update donates the state's buffers.

    On TPUs the compiler chooses the memory layout of frozen parameters (see `laid_out`): with
    the default layout each step would begin by copying them.
    """
    given = jax.tree.map(lambda a: a.sharding, (state, frozen, batches))
    if platform_of(state) == "tpu":
        given = (
            given[0],
            jax.tree.map(lambda sharding: Format(Layout.AUTO, sharding), given[1]),
            given[2],
        )
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (state, frozen, batches)
    )
    return jax.jit(
        update,
        donate_argnums=0,
        in_shardings=given,
        out_shardings=(given[0], state.step.sharding),
    ).trace(*shapes)


def laid_out(compiled: jax.stages.Compiled, frozen: Parameters) -> Parameters:
    """Brings frozen parameters into the memory layout that a compiled update expects. One
    array after the other, so that no second copy of all is needed.
    """
    formats = compiled.input_formats[0][1]
    return {
        name: jax.device_put(value, formats[name], donate=True) for name, value in frozen.items()
    }


def platform_of(state: Any) -> str:
    """Returns "cpu", "gpu" or "tpu": the platform of the state's devices."""
    return next(iter(state.step.sharding.device_set)).platform


def compile_traced(traced: jax.stages.Traced, platform: str) -> jax.stages.Compiled:
    """Compiles a traced function with the compiler options for its platform."""
    return traced.lower().compile(compiler_options=TPU_OPTIONS if platform == "tpu" else None)


def compile_update(update: Update, state: Any, frozen: Any, batches: Any) -> jax.stages.Compiled:
    """Traces and compiles the update: see `trace_update`."""
    return compile_traced(trace_update(update, state, frozen, batches), platform_of(state))


WITHOUT_IMAGES = "_without_images"
"""Suffix of held-out metrics for which the images were removed."""


def make_held_out_loss(
    graph: Any, task: Task, microbatches: int = 1
) -> Callable[..., dict[str, Loss]]:
    """Makes the function (trainable, frozen, batch) -> {"": Loss, "_without_images": Loss} of
    a held-out batch, to be jitted; the second loss only if the task has one.

    microbatches: the batch goes through the model in this many equal parts, one after the
    other.
    """

    def of(trainable: Parameters, frozen: Parameters, batch: Batch) -> Loss:
        def loss(part: Batch) -> Loss:
            return task.losses(merge_model(graph, trainable, frozen), {"": part}, None)[""]

        if microbatches == 1:
            return loss(batch)
        return scan_sum(loss, task.microbatches(batch, microbatches))

    def losses(trainable: Parameters, frozen: Parameters, batch: Batch) -> dict[str, Loss]:
        text = task.without_images(batch)
        found = {"": of(trainable, frozen, batch)}
        return found if text is None else found | {WITHOUT_IMAGES: of(trainable, frozen, text)}

    return losses
