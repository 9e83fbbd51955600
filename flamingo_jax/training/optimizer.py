"""AdamW as the paper has it, built with optax from the config (paper B.1.2, B.1.3)."""

import re
from collections.abc import Mapping
from typing import Any

import optax

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import OptimizerConfig

VECTORS = r".*(norm/(scale|bias)|_bias|/bias|/gain|skip_gain|_gate|log_inverse_temperature)"
"""Scales, biases and gates: pulling them to 0 would switch parts off rather than regularise them, so they are not decayed."""


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then constant, or down to `end_rate` at the last step."""
    rest = max(steps - config.warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(config.peak_rate),
        "linear": lambda: optax.linear_schedule(config.peak_rate, config.end_rate, rest),
        "cosine": lambda: optax.cosine_decay_schedule(config.peak_rate, rest, config.end_rate / config.peak_rate),
    }[config.decay]()
    if not config.warmup_steps:
        return after
    # The rate of update 0 is peak / warmup: a first update of rate 0 would be a step lost.
    warmup = lambda count: config.peak_rate * (count + 1) / config.warmup_steps
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int, parameters: Mapping[str, Any]) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW; optionally adaptive clipping of the contrastive stage's vision encoder.

    Args:
      parameters: the trainable ones by flat name; only names matter here. Norms, biases and gates get no weight decay, nor do the
        names that `config.no_decay` matches.

    Raises: UserError for a pattern in `no_decay` that matches nothing.
    """
    for pattern in config.no_decay:
        if not any(re.fullmatch(pattern, name) for name in parameters):
            raise UserError(f"config.optimizer.no_decay has {pattern!r}, which matches no trained parameter: mend or remove it")
    exempt = (VECTORS, *config.no_decay)
    decayed = {name: not any(re.fullmatch(pattern, name) for pattern in exempt) for name in parameters}
    parts = []
    if config.adaptive_clip:
        # NFNet's clipping is for the convolutions; the other tower is clipped by its norm.
        vision = {name: name.startswith("vision/") for name in parameters}
        parts.append(optax.masked(optax.adaptive_grad_clip(config.adaptive_clip), vision))
        others = {name: not inside for name, inside in vision.items()}
        parts.append(optax.masked(optax.clip_by_global_norm(config.clip_norm), others))
    elif config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(
        optax.adamw(make_schedule(config, steps), b1=config.beta1, b2=config.beta2, eps=config.eps, weight_decay=config.weight_decay, mask=decayed)
    )
    return optax.chain(*parts)
