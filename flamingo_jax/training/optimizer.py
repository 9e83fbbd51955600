"""Makes the optimizer of a config: AdamW with clipping, weight decay by parameter name, and a
learning rate schedule (paper B.1.2, B.1.3).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import OptimizerConfig
from flamingo_jax.partitioning.rules import stack_axes

Array = jax.Array
Tree = dict[str, Array]

VISION_ENCODER = "(vision|vision_encoder)/.*"
"""Names of the parameters that adaptive clipping applies to."""


def make_optimizer(
    config: OptimizerConfig, steps: int, trainable: Mapping[str, Any], updates_per_step: int = 1
) -> optax.GradientTransformation:
    """Makes AdamW: clipping, then Adam, weight decay, and the learning rate schedule.

    Weight decay skips the names of `config.weight_decay_exclude` (paper: the resampler) and,
    unless `config.weight_decay_on_vectors`, all norm scales, biases and gates. The paper
    decays "new parameters" and does not mention vectors; decay would pull norm scales to 0 and
    hold back the tanh gates, which must grow from 0, and public recipes of such models exclude
    them.

    With `config.adaptive_clip` the vision encoder is clipped unit by unit (Brock et al. 2021),
    and the clip by global norm sees the rest only, as in the paper's contrastive stage (NFNet:
    1e-2, text encoder: 10).

    Args:
      steps: length of the run, where a decaying learning rate reaches its end.
      trainable: {flat name: anything with a shape}, the tree that `init` and `update` will get.
      updates_per_step: how often `update` is called in each of the `steps`, with one learning
        rate.

    Raises: UserError for an expression in `weight_decay_exclude` that matches no parameter.
    """
    # A mask of plain booleans, computed here from the shapes: every leaf of the optimizer
    # state is then an array, with the sharding of its parameter.
    decayed = decay_mask(config, trainable)
    return optax.chain(
        clip(config, trainable),
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        (
            optax.add_decayed_weights(config.weight_decay, decayed)
            if config.weight_decay
            else optax.identity()
        ),
        optax.scale_by_learning_rate(make_schedule(config, steps, updates_per_step)),
        *([scale_parts(config, trainable)] if config.learning_rate_scales else []),
    )


def scale_parts(config: OptimizerConfig, names: Iterable[str]) -> optax.GradientTransformation:
    """Multiplies the updates of the parts named in `config.learning_rate_scales`.

    Raises: UserError for a part that has no trained parameter.
    """
    parts = _parts(names)
    for part in config.learning_rate_scales:
        if part not in parts:
            raise UserError(
                f"config.optimizer.learning_rate_scales has {part!r}, which is no trained part:"
                f" there are {', '.join(parts)}"
            )

    def update(
        updates: Tree, state: optax.EmptyState, parameters: Tree | None = None
    ) -> tuple[Tree, optax.EmptyState]:
        scales = config.learning_rate_scales
        return {
            name: u * scales[part] if (part := name.split("/")[0]) in scales else u
            for name, u in updates.items()
        }, state

    return optax.GradientTransformation(lambda parameters: optax.EmptyState(), update)


def make_schedule(
    config: OptimizerConfig, steps: int, updates_per_step: int = 1
) -> Callable[[Array | int], Array]:
    """Makes the learning rate schedule: update number, from 0 -> learning rate.

    Step n of the warmup, counted from 1, has learning rate n / warmup_steps * `learning_rate`,
    so that the first step already learns. Afterwards the rate is constant, decays linearly or
    as a cosine to `end_learning_rate` at `steps`, or is multiplied by `boundary_factor` after
    each step of `boundaries`.

    Raises: UserError where steps, schedule and boundaries do not fit together.
    """
    _check_boundaries(config, steps)

    def rate(count: Array | int) -> Array:
        # Works on traced counts: all schedules are computed, and one is chosen by its name.
        done = jnp.asarray(count // updates_per_step, jnp.float32)
        warm = jnp.minimum((done + 1) / max(config.warmup_steps, 1), 1.0)
        progress = jnp.clip(
            (done - config.warmup_steps) / max(steps - config.warmup_steps, 1), 0.0, 1.0
        )
        remaining = {
            "constant": jnp.ones_like(progress),
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "stepwise": (
                config.boundary_factor
                ** (done[..., None] >= jnp.asarray(config.boundaries, jnp.float32)).sum(-1)
            ),
        }[config.schedule]
        end = config.end_learning_rate if config.schedule in ("linear", "cosine") else 0.0
        return warm * (end + (config.learning_rate - end) * remaining)

    return rate


def _check_boundaries(config: OptimizerConfig, steps: int) -> None:
    """Raises UserError for boundaries that the schedule does not use, or that are not rising
    steps within the run.
    """
    boundaries = config.boundaries
    if config.schedule != "stepwise":
        if boundaries:
            raise UserError(
                "config.optimizer.boundaries is set, but schedule is"
                f" {config.schedule!r}: set schedule to 'stepwise' or boundaries to ()"
            )
        return
    rising = list(boundaries) == sorted(set(boundaries))
    if not boundaries or not rising or not 0 < boundaries[0] <= boundaries[-1] < steps:
        raise UserError(
            f"config.optimizer.boundaries is {boundaries}, but a stepwise schedule needs rising"
            f" steps between 1 and {steps - 1}, the last but one of the run: mend it"
        )
    if not 0 < config.boundary_factor <= 1:
        raise UserError(
            f"config.optimizer.boundary_factor is {config.boundary_factor}, but must be above 0 and"
            " at most 1: the paper's is 0.1"
        )


def decay_mask(config: OptimizerConfig, trainable: Mapping[str, Any]) -> dict[str, bool]:
    """Returns which parameters are decayed: {flat name: bool}.

    Raises: UserError for an expression in `weight_decay_exclude` that matches no parameter.
    """
    if not config.weight_decay:
        return dict.fromkeys(trainable, False)
    for pattern in config.weight_decay_exclude:
        if not any(re.fullmatch(pattern, name) for name in trainable):
            raise UserError(
                f"config.optimizer.weight_decay_exclude has {pattern!r}, which matches no trained"
                f" parameter; they start with {', '.join(_parts(trainable))}"
            )
    return {
        name: (
            not any(re.fullmatch(pattern, name) for pattern in config.weight_decay_exclude)
            and (config.weight_decay_on_vectors or not _is_vector(name, like.shape))
        )
        for name, like in trainable.items()
    }


def clip(config: OptimizerConfig, names: Iterable[str]) -> optax.GradientTransformation:
    """Clips gradients: the vision encoder's by `adaptive_clip`, all others by their global
    norm; a limit of 0 turns either off.
    """
    unitwise = frozenset(
        name for name in names if config.adaptive_clip and re.fullmatch(VISION_ENCODER, name)
    )

    def update(
        gradient: Tree, state: optax.EmptyState, parameters: Tree | None = None
    ) -> tuple[Tree, optax.EmptyState]:
        rest = {name: g for name, g in gradient.items() if name not in unitwise}
        if config.clip_norm and rest:
            # Not optax.clip_by_global_norm: `rest` excludes the adaptively clipped encoder.
            norm = optax.global_norm(rest)
            scale = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-30))
            rest = {name: g * scale for name, g in rest.items()}
        if unitwise:
            assert parameters is not None
            rest |= {
                name: adaptive_clip(name, gradient[name], parameters[name], config.adaptive_clip)
                for name in unitwise
            }
        return {name: rest[name] for name in gradient}, state

    return optax.GradientTransformation(lambda parameters: optax.EmptyState(), update)


def adaptive_clip(
    name: str, gradient: Array, parameter: Array, limit: float, eps: float = 1e-3
) -> Array:
    """Scales each unit of `gradient` down to a norm of at most `limit` times that of the
    unit's parameters, or `eps` where that is larger (adaptive gradient clipping, Brock et al.
    2021).

    A unit is an output of the layer, see `unit_axes`; layers of a stack are separate.
    """
    axes = unit_axes(name, gradient.ndim)

    def norm(x: Array) -> Array:
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))

    allowed = limit * jnp.maximum(norm(parameter), eps)
    actual = norm(gradient)
    return gradient * jnp.where(actual > allowed, allowed / jnp.maximum(actual, 1e-6), 1.0)


def unit_axes(name: str, ndim: int) -> tuple[int, ...]:
    """Returns the axes over which adaptive clipping takes norms: those of a unit's weights.

    For an attention's maps to heads [D, H, d], a matrix of H * d outputs, these are D. For
    other matrices, convolutions and tables they are all axes but the last; vectors, including
    biases [H, d], are one unit.
    """
    lead = stack_axes(name)
    if ndim - lead < 2 or name.endswith("bias"):
        return tuple(range(lead, ndim))
    return (lead,) if re.fullmatch(TO_HEADS, name) else tuple(range(lead, ndim - 1))


TO_HEADS = "(.*/)?attention/(query|key|value)"


def _is_vector(name: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a parameter is a scale, bias or gate, the layer axis of a stack aside."""
    # By name too: attention's biases are [H, d].
    return len(shape) - stack_axes(name) < 2 or name.endswith("bias")


def _parts(names: Iterable[str]) -> list[str]:
    """Returns the model's parts: the first components of the names, sorted."""
    return sorted({name.split("/")[0] for name in names})
