"""Ordered tables of (regular expression, rule) over parameter names: what trains, and where
each array's axes lie on the mesh.

The first expression that matches the whole name decides. A parameter that no rule matches and a
rule that matches nothing are errors: a table that has fallen behind the model says so at once.
Names of stacks carry no layer number, and a rule speaks of one layer: the leading layer axis is
never sharded, since the scan over layers would gather it at every step.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flamingo_jax.errors import UserError
from flamingo_jax.partitioning.mesh import DATA, FSDP, MODEL
from flamingo_jax.pytrees import STACK
from flamingo_jax.weight_parts import Axes, is_update, weight_name, weight_part

R = TypeVar("R")
LARGE = 2**24
"""An array with more elements than this that an axis of the mesh should shard, but cannot, is
an error: it would fill every device.
"""


class Rule(NamedTuple, Generic[R]):
    """What holds for the parameters whose names match a pattern."""

    pattern: str
    """Regular expression for the whole name."""
    value: R
    optional: bool = False
    """The model has these parameters only with some of its options, so that the rule may match
    nothing.
    """


FREEZING: dict[str, tuple[Rule[bool], ...]] = {
    "contrastive": (Rule(".*", True),),
    "language_modelling": (Rule(".*", True),),
    "flamingo": (
        Rule("vision_encoder/.*", False),
        Rule("language_model/.*", False),
        Rule("resampler/.*", True),
        Rule("visual_projection", True),
        Rule("gated_xattn/layers/.*", True),
        Rule("grafted/layers/.*", True, optional=True),
        Rule("extra_embedding", True),
    ),
}
"""By task: True trains.

What is frozen has no gradient, no moments and no place in a checkpoint.
"""

REPLICATED: Axes = ()


def _language_model(prefix: str) -> tuple[Rule[Axes], ...]:
    """Megatron (Shoeybi et al. 2019): heads and hidden units over `model`, the vocabulary too;
    norms on every device.
    """
    return (
        Rule(f"{prefix}embedding", (MODEL, None)),
        Rule(f"{prefix}position_embedding", REPLICATED, optional=True),
        Rule(f"{prefix}head", (None, MODEL), optional=True),
        Rule(f"{prefix}layers/attention/(query|key|value|position)", (None, MODEL, None)),
        Rule(
            f"{prefix}layers/attention/(content|position|query|key|value)_bias",
            (MODEL, None),
            optional=True,
        ),
        Rule(f"{prefix}layers/attention/(query|key)_norm/(scale|bias)", REPLICATED, optional=True),
        Rule(f"{prefix}layers/attention/out", (MODEL, None, None)),
        Rule(f"{prefix}layers/feed_forward/(gate|up)", (None, MODEL)),
        Rule(f"{prefix}layers/feed_forward/down", (MODEL, None)),
        Rule(f"{prefix}layers/feed_forward/up_bias", (MODEL,), optional=True),
        Rule(f"{prefix}layers/(attention/out|feed_forward/down)_bias", REPLICATED, optional=True),
        Rule(f"{prefix}(layers/[a-z_]+_norm|final_norm)/(scale|bias)", REPLICATED),
    )


SHARDING: dict[str, tuple[Rule[Axes], ...]] = {
    "contrastive": (
        Rule("vision/.*", REPLICATED),
        Rule("text/.*", REPLICATED),
        Rule("(vision|text)_projection", REPLICATED),
        Rule("log_inverse_temperature", REPLICATED),
    ),
    "language_modelling": _language_model(""),
    "flamingo": (
        # The paper leaves the encoder whole on every device; it runs data-parallel.
        Rule("vision_encoder/.*", REPLICATED),
        Rule("(resampler|gated_xattn)/layers/(query|key|value)", (None, MODEL, None)),
        Rule("(resampler|gated_xattn)/layers/out", (MODEL, None, None)),
        Rule("(resampler|gated_xattn)/layers/feed_forward/up", (None, MODEL)),
        Rule("(resampler|gated_xattn)/layers/feed_forward/down", (MODEL, None)),
        Rule("resampler/.*", REPLICATED),
        Rule("visual_projection", REPLICATED),
        Rule("gated_xattn/layers/([a-z]+_norm/(scale|bias)|[a-z]+_gate)", REPLICATED),
        *_language_model("(language_model|grafted)/"),
        Rule("grafted/layers/gate", REPLICATED, optional=True),
        Rule("extra_embedding", REPLICATED),
    ),
}
"""By task: where `model` lies. `fsdp` is added to what trains: see `shardings`."""


def match(rules: Sequence[Rule[R]], names: Iterable[str]) -> dict[str, R]:
    """Returns each name's rule.

    Raises: ValueError for a name that no rule matches, or a rule that is not optional and
    decides nothing.
    """
    used, found = set(), {}
    for name in names:
        place = next(
            (place for place, rule in enumerate(rules) if re.fullmatch(rule.pattern, name)),
            None,
        )
        if place is None:
            raise ValueError(
                f"no rule matches the parameter {name!r}: add one to the table in {__name__}"
            )
        used.add(place)
        found[name] = rules[place].value
    for place, rule in enumerate(rules):
        if place not in used and not rule.optional:
            raise ValueError(
                f"the rule {rule.pattern!r} decides about no parameter: correct or remove it in"
                f" {__name__}"
            )
    return found


def trainable_names(
    task: str, names: Iterable[str], unfrozen: Collection[str] = ()
) -> frozenset[str]:
    """Returns the names of the parameters that the task trains. unfrozen: parts (what names
    begin with) that train although the table freezes them.

    Of a model with low-rank updates these alone train.
    """
    names = list(names)
    rules = match(FREEZING[task], dict.fromkeys(map(weight_name, names)))
    parts = {name: weight_part(name) for name in names}
    updated = {name.split(STACK)[0] for name in names if is_update(name)}

    def trains(name: str) -> bool:
        if part := parts[name]:
            return part.trains
        if name.startswith(tuple(updated)):
            return False
        return rules[name] or name.split("/")[0] in unfrozen

    return frozenset(filter(trains, names))


def shardings(
    task: str, shapes: Mapping[str, Any], mesh: Mesh, unfrozen: Collection[str] = ()
) -> dict[str, NamedSharding]:
    """Returns each parameter's sharding.

    `model` lies where the task's table says. `fsdp` shards the largest other axis, that it
    divides, of every trained matrix. An axis that does not divide is left whole, which is a
    UserError for arrays of more than LARGE elements.

    Args:
      shapes: {name: anything with a shape}, stacks with their leading layer axis.
      unfrozen: as for `trainable_names`.
    """
    trained = trainable_names(task, shapes, unfrozen)
    rules = match(SHARDING[task], dict.fromkeys(map(weight_name, shapes)))

    def axes(name: str, shape: tuple[int, ...]) -> Axes:
        whole, part = rules[weight_name(name)], weight_part(name)
        return part.axes(whole, len(shape) - stack_axes(name)) if part else whole

    return {
        name: NamedSharding(mesh, _spec(name, s.shape, axes(name, s.shape), mesh, name in trained))
        for name, s in shapes.items()
    }


def moment_shardings(parameters: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """Returns where the moments and the summed gradient of trained parameters lie: as they do,
    and over `data` besides, on the largest axis that is free and divides (ZeRO-1, Rajbhandari
    et al. 2020; paper B.1.2).

    Args:
      parameters: {name: anything with a shape and a NamedSharding}.
    """
    return {
        name: NamedSharding(p.sharding.mesh, _over_data(name, p.shape, p.sharding))
        for name, p in parameters.items()
    }


def _over_data(name: str, shape: tuple[int, ...], sharding: NamedSharding) -> PartitionSpec:
    lead, count = stack_axes(name), sharding.mesh.shape[DATA]
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    free = [
        place
        for place in range(lead, len(shape))
        if spec[place] is None and shape[place] % count == 0
    ]
    if count > 1 and len(shape) - lead > 1 and free:
        spec[max(free, key=lambda place: shape[place])] = DATA
    return PartitionSpec(*spec)


def stack_axes(name: str) -> int:
    """Returns the number of leading layer axes that an array of this name has."""
    return name.split("/").count(STACK)


def _spec(
    name: str, shape: tuple[int, ...], axes: Axes, mesh: Mesh, trained: bool
) -> PartitionSpec:
    lead = stack_axes(name)
    layer = shape[lead:]
    if len(axes) > len(layer):
        raise ValueError(
            f"the rule for {name!r} speaks of {len(axes)} axes, but one layer of it has shape"
            f" {layer}"
        )
    spec: list[str | None] = [*axes, *[None] * (len(layer) - len(axes))]
    for place, axis in enumerate(spec):
        if axis is not None and layer[place] % mesh.shape[axis]:
            _require_small(name, shape, axis, mesh)
            spec[place] = None
    # Vectors are not worth a message each.
    if trained and len(layer) > 1 and mesh.shape[FSDP] > 1:
        free = [
            place
            for place, axis in enumerate(spec)
            if axis is None and layer[place] % mesh.shape[FSDP] == 0
        ]
        if free:
            spec[max(free, key=lambda place: layer[place])] = FSDP
        else:
            _require_small(name, shape, FSDP, mesh)
    return PartitionSpec(
        *[None] * lead,
        *[axis if axis is not None and mesh.shape[axis] > 1 else None for axis in spec],
    )


def _require_small(name: str, shape: tuple[int, ...], axis: str, mesh: Mesh) -> None:
    if math.prod(shape) > LARGE:
        raise UserError(
            f"{name!r} with shape {shape} cannot be sharded over {axis}={mesh.shape[axis]} and"
            f" would be whole on every device: choose a config.mesh.{axis} that divides one of"
            " its axes"
        )
