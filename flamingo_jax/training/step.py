"""The update: gradients of every dataset, weighted and summed, then one step of the optimizer
(paper 2.4).
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Format, Layout

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import DatasetConfig
from flamingo_jax.tasks.flops import work_in
from flamingo_jax.tasks.task import Batch, Loss, StreamTask, Task, divisor
from flamingo_jax.training.state import Parameters, TrainState, merge_model

Array = jax.Array
Update = Callable[[TrainState, Parameters, dict[str, Batch]], tuple[TrainState, dict[str, Any]]]


def accumulated(
    graph: Any,
    task: Task,
    trainable: Parameters,
    frozen: Parameters,
    batches: Mapping[str, Batch],
    key: Array,
    datasets: Mapping[str, DatasetConfig],
) -> tuple[dict[str, Loss], Parameters, dict[str, Array]]:
    """The reference form: dataset after dataset, each one's gradient scaled by lambda_m /
    weight_m and added in float32.

    Returns: losses, the gradient, and the norm of each dataset's part of it.
    """
    losses: dict[str, Loss] = {}
    norms: dict[str, Array] = {}
    gradient: Parameters = {}
    for name, batch in batches.items():

        def total(trainable: Parameters, part: Batch, key: Array) -> tuple[Array, Loss]:
            loss = task.loss(merge_model(graph, trainable, frozen), part, key)
            return loss.total, loss

        config = datasets[name]
        parts = task.microbatches(batch, config.microbatches) if config.microbatches > 1 else None
        losses[name], grads = _over_parts(
            jax.grad(total, has_aux=True), trainable, batch, parts, dataset_key(key, name)
        )
        scale = config.weight / divisor(losses[name].weight)
        scaled = {k: scale * g.astype(jnp.float32) for k, g in grads.items()}
        norms[name] = optax.global_norm(scaled)
        gradient = {k: gradient[k] + g for k, g in scaled.items()} if gradient else scaled
    return losses, gradient, norms


def streamed(
    graph: Any,
    task: StreamTask,
    trainable: Parameters,
    frozen: Parameters,
    batches: Mapping[str, Batch],
    key: Array,
    datasets: Mapping[str, DatasetConfig],
) -> tuple[dict[str, Loss], Parameters, dict[str, Array]]:
    """The fast form of the same gradient: the sum of the scaled gradients is the gradient of
    the scaled sum, taken once of all datasets' tokens.

    Of several datasets none has a gradient of its own here, so that no norms are returned.
    """
    weights = {name: task.weight(batch) for name, batch in batches.items()}
    scales = {name: datasets[name].weight / divisor(weight) for name, weight in weights.items()}

    def total(
        trainable: Parameters, part: dict[str, Batch], key: Array
    ) -> tuple[Array, dict[str, Loss]]:
        losses = task.stream_losses(merge_model(graph, trainable, frozen), part, key)
        return (
            sum((scales[name] * loss.total for name, loss in losses.items()), jnp.float32(0)),
            losses,
        )

    count = next(iter(datasets.values())).microbatches
    parts = (
        {name: task.microbatches(batch, count) for name, batch in batches.items()}
        if count > 1
        else None
    )
    # One key for all: their examples are drawn for as one batch's.
    key = dataset_key(key, *batches)
    losses, grads = _over_parts(jax.grad(total, has_aux=True), trainable, dict(batches), parts, key)
    gradient = {name: g.astype(jnp.float32) for name, g in grads.items()}
    norms = {name: optax.global_norm(gradient) for name in batches} if len(batches) == 1 else {}
    return losses, gradient, norms


def dataset_key(key: Array, *names: str) -> Array:
    """The step's key for these datasets, whose draws are then no other's, whatever their order."""
    return jax.random.fold_in(key, zlib.crc32("\n".join(names).encode()))


def _over_parts(
    gradient: Callable[..., Any], trainable: Parameters, batch: Any, parts: Any, key: Array
) -> tuple[Any, Parameters]:
    """What `gradient(trainable, batch, key) -> (gradient, losses)` gives, summed over the parts
    of the batch, one after the other, where there are any.
    """
    if parts is None:
        grads, losses = gradient(trainable, batch, key)
        return losses, grads

    def add(carry: Any, inputs: Any) -> tuple[Any, None]:
        part, key = inputs
        grads, losses = gradient(trainable, part, key)
        return jax.tree.map(jnp.add, carry, (losses, grads)), None

    keys = jax.random.split(key, jax.tree.leaves(parts)[0].shape[0])
    grads, losses = jax.eval_shape(
        gradient, trainable, jax.tree.map(lambda a: a[0], parts), keys[0]
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (losses, grads))
    return jax.lax.scan(add, zeros, (parts, keys))[0]


def make_update(
    graph: Any,
    task: Task,
    optimizer: optax.GradientTransformation,
    datasets: Mapping[str, DatasetConfig],
    mode: str = "accumulate",
    gradient_shardings: Mapping[str, jax.sharding.NamedSharding] | None = None,
    schedule: Callable[[Array], Array] | None = None,
) -> Update:
    """The jittable update (state, frozen, {dataset: batch}) -> (state, metrics).

    gradient = sum over datasets m of lambda_m * d(total_m) / weight_m. A step whose losses or
    gradient are not finite leaves parameters, moments and the optimizer's count as they were,
    and is counted. `mode`: `TrainingConfig.mixing`. gradient_shardings: where the gradient is
    summed to; by default the compiler chooses. schedule: the optimizer's, to tell its rate.

    metrics: {"loss", "loss/<dataset>", "<metric>/<dataset>", "gradient_norm",
    "gradient_norm/<dataset>", "learning_rate", "finite/<dataset>", "skipped",
    "skipped_in_a_row", "work"}. gradient_norm: before it is clipped, under round_robin the
    largest of the datasets'. gradient_norm/<dataset>: of lambda_m * d(total_m) / weight_m; a
    stream of several datasets takes their gradient at once and does not know it. learning_rate:
    of this step's update. work: int32 [4], the batches' `tasks.flops.Work` on all devices.
    Raises: UserError where the task has no form for the mode, or a stream's datasets have
      different numbers of microbatches.
    """
    if mode == "stream":
        if not isinstance(task, StreamTask):
            raise UserError(
                "config.training.mixing is 'stream', which this task has no form of: set it to"
                " 'accumulate'"
            )
        if len({config.microbatches for config in datasets.values()}) > 1:
            raise UserError(
                "config.training.mixing is 'stream', whose datasets share their microbatches:"
                " give them all the same number"
            )
    form: Callable[..., Any] = streamed if mode == "stream" else accumulated

    def losses_and_gradients(
        state: TrainState, frozen: Parameters, batches: dict[str, Batch], names: list[str]
    ) -> Any:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        losses, gradient, norms = form(
            graph,
            task,
            state.trainable,
            frozen,
            {name: batches[name] for name in names},
            key,
            datasets,
        )
        if gradient_shardings is not None:
            gradient = jax.lax.with_sharding_constraint(gradient, dict(gradient_shardings))
        metrics: dict[str, Any] = {"loss": jnp.float32(0)} | {
            f"gradient_norm/{name}": norm for name, norm in norms.items()
        }
        for name, loss in losses.items():
            value = loss.value
            metrics["loss"] += datasets[name].weight * value
            metrics[f"loss/{name}"] = value
            metrics |= {
                f"{metric}/{name}": a / jnp.maximum(b, 1e-9)
                for metric, (a, b) in loss.metrics.items()
            }
        return metrics, gradient

    def apply(
        state: TrainState, metrics: dict[str, Any], gradient: Parameters, names: list[str]
    ) -> tuple[TrainState, dict[str, Any]]:
        norm = optax.global_norm(gradient)
        metrics["gradient_norm"] = norm
        metrics |= {f"finite/{name}": jnp.isfinite(metrics[f"loss/{name}"]) for name in names}
        if schedule is not None:
            metrics["learning_rate"] = schedule(
                optax.tree.get_all_with_path(state.optimizer, "count")[0][1]
            )
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
        )
        return state, metrics

    def update(
        state: TrainState, frozen: Parameters, batches: dict[str, Batch]
    ) -> tuple[TrainState, dict[str, Any]]:
        names = list(datasets)
        groups = [[name] for name in names] if mode == "round_robin" else [names]
        metrics: dict[str, Any] = {}
        skipped_before = state.skipped
        for group in groups:
            part, gradient = losses_and_gradients(state, frozen, batches, group)
            state, part = apply(state, part, gradient, group)
            before = metrics.get("loss", 0.0), metrics.get("gradient_norm", 0.0)
            metrics |= part | {
                "loss": before[0] + part["loss"],
                "gradient_norm": jnp.maximum(before[1], part["gradient_norm"]),
            }
        state = state._replace(
            skipped_in_a_row=jnp.where(
                state.skipped > skipped_before, state.skipped_in_a_row + 1, 0
            )
        )
        metrics["work"] = jnp.stack(
            [jnp.asarray(count, jnp.int32) for count in work_in(batches.values())]
        )
        metrics |= task.watch(state.trainable) | {
            "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
        }
        return state._replace(step=state.step + 1), metrics

    return update


TPU_OPTIONS: dict[str, str | bool] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
"""A product whose weight is gathered, or whose result is scattered, stays whole rather than a
loop over the devices' shares: the loops' small products take several times the compiler's
cycles of the whole one, and their code most of the time to compile.
"""


def trace_update(update: Update, state: Any, frozen: Any, batches: Any) -> jax.stages.Traced:
    """The update traced for arrays, or shapes with shardings, like these; compiled, it takes
    over the state's memory.

    On TPUs the compiler chooses how frozen parameters lie in memory (see `laid_out`): in the
    default order a step would begin with copies of them.
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
    """Frozen parameters in the memory layout that a compiled update takes them in, one after
    the other.
    """
    formats = compiled.input_formats[0][1]
    return {
        name: jax.device_put(value, formats[name], donate=True) for name, value in frozen.items()
    }


def platform_of(state: Any) -> str:
    """ "cpu", "gpu" or "tpu": of the devices that the state's arrays, or shapes with shardings,
    lie on.
    """
    return next(iter(state.step.sharding.device_set)).platform


def compile_traced(traced: jax.stages.Traced, platform: str) -> jax.stages.Compiled:
    """What was traced, with the options that its kind of device wants of the compiler."""
    return traced.lower().compile(compiler_options=TPU_OPTIONS if platform == "tpu" else None)


def compile_update(update: Update, state: Any, frozen: Any, batches: Any) -> jax.stages.Compiled:
    """`trace_update`, compiled."""
    return compile_traced(trace_update(update, state, frozen, batches), platform_of(state))


WITHOUT_IMAGES = "_without_images"


def make_held_out_loss(
    graph: Any, task: Task, microbatches: int = 1
) -> Callable[..., dict[str, Loss]]:
    """The jittable losses (trainable, frozen, batch) -> {"": Loss, "_without_images": Loss}
    of one held-out batch, the second where the task has one. The batch goes through the model
    in so many equal parts, one after the other.
    """

    def of(trainable: Parameters, frozen: Parameters, batch: Batch) -> Loss:
        loss = lambda part: task.loss(merge_model(graph, trainable, frozen), part, None)
        if microbatches == 1:
            return loss(batch)
        parts = task.microbatches(batch, microbatches)
        shape = jax.eval_shape(loss, jax.tree.map(lambda a: a[0], parts))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
        return jax.lax.scan(
            lambda total, part: (jax.tree.map(jnp.add, total, loss(part)), None), zeros, parts
        )[0]

    def losses(trainable: Parameters, frozen: Parameters, batch: Batch) -> dict[str, Loss]:
        text = task.without_images(batch)
        found = {"": of(trainable, frozen, batch)}
        return found if text is None else found | {WITHOUT_IMAGES: of(trainable, frozen, text)}

    return losses
