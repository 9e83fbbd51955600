"""Partition rules: ordered tables of (regular expression, value) over parameter names, which
say what is trained and how each array is sharded over the mesh.

The first expression that matches the whole name decides. A parameter that no rule matches and
a rule that matches no parameter are errors, so that a table cannot fall behind the model
unnoticed. Parameters of a stack of layers have one name and a leading layer axis, which rules
do not mention: it is never sharded, since the scan over layers would gather it at every step.
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
"""Elements of the largest array that may be replicated where a rule says that it is sharded
but its shape does not divide; a larger one is an error, since it would fill every device.
"""


class Rule(NamedTuple, Generic[R]):
    """A value for all parameters whose names match a pattern."""

    pattern: str
    """Regular expression for the whole name."""
    value: R
    optional: bool = False
    """The rule may match nothing: models have these parameters only with some options."""


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
"""{task: rules}; True: trained. Frozen parameters have no gradient and no moments, and are not
in checkpoints.
"""

REPLICATED: Axes = ()


def _language_model(prefix: str) -> tuple[Rule[Axes], ...]:
    """Makes the rules of a language model as in Megatron (Shoeybi et al. 2019): heads, hidden
    units and the vocabulary are sharded over `model`, norms are replicated.
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
        # Replicated as in the paper: the encoder runs data-parallel over all devices.
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
"""{task: rules}; for each axis of one layer's array the mesh axis that shards it, or None.
`shardings` adds `fsdp` to trained parameters.
"""


def match(rules: Sequence[Rule[R]], names: Iterable[str]) -> dict[str, R]:
    """Returns {name: value of the first rule that matches it}.

    Raises: ValueError for a name that no rule matches, or a rule that decides about no name
      and is not optional.
    """
    # used: indices of the rules that decided about some name.
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
    """Returns the names of the parameters that the task trains.

    unfrozen: parts (first components of names) that are trained although the table freezes
    them. Of a language model with LoRA only the low-rank updates are trained.
    """
    names = list(names)
    rules = match(FREEZING[task], dict.fromkeys(map(weight_name, names)))
    parts = {name: weight_part(name) for name in names}
    # Prefixes of language models with LoRA: "language_model/", or "" if it is the whole model.
    updated = {name.split(STACK)[0] for name in names if is_update(name)}

    def trains(name: str) -> bool:
        if part := parts[name]:
            return part.trains
        if name.startswith(tuple(updated)):
            return False
        return rules[name] or name.split("/")[0] in unfrozen

    return frozenset(filter(trains, names))


def shardings(
    task: str,
    shapes: Mapping[str, Any],
    mesh: Mesh,
    unfrozen: Collection[str] = (),
    *,
    gather_frozen: bool = False,
) -> dict[str, NamedSharding]:
    """Returns each parameter's sharding.

    `model` shards the axis that the task's table says, `fsdp` the largest other divisible axis
    of every trained matrix. An axis that does not divide is not sharded.

    Args:
      shapes: {name: anything with a shape}, stacks with their leading layer axis.
      unfrozen: as for `trainable_names`.
      gather_frozen: shard frozen matrices over `fsdp` too, so that each layer's are gathered
        where they are used.

    Raises: UserError for an array of more than LARGE elements with an axis that does not
    divide.
    """
    gathered = frozenset(shapes) if gather_frozen else trainable_names(task, shapes, unfrozen)
    rules = match(SHARDING[task], dict.fromkeys(map(weight_name, shapes)))

    def axes(name: str, shape: tuple[int, ...]) -> Axes:
        whole, part = rules[weight_name(name)], weight_part(name)
        return part.axes(whole, len(shape) - stack_axes(name)) if part else whole

    return {
        name: NamedSharding(mesh, _spec(name, s.shape, axes(name, s.shape), mesh, name in gathered))
        for name, s in shapes.items()
    }


def moment_shardings(parameters: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """Returns the shardings of moments and reduced gradients: those of the parameters, with
    `data` in addition on the largest free axis that divides (ZeRO-1, Rajbhandari et al. 2020;
    paper B.1.2).

    Args:
      parameters: {name: anything with a shape and a NamedSharding}.
    """
    return {
        name: NamedSharding(p.sharding.mesh, _over_data(name, p.shape, p.sharding))
        for name, p in parameters.items()
    }


def _over_data(name: str, shape: tuple[int, ...], sharding: NamedSharding) -> PartitionSpec:
    """Adds `data` to the spec of a trained matrix; vectors stay as they are."""
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
    name: str, shape: tuple[int, ...], axes: Axes, mesh: Mesh, gathered: bool
) -> PartitionSpec:
    """Makes an array's spec from its rule's `axes`, which are those of one layer, and shards
    it over `fsdp` if it is to be gathered where it is used.
    """
    lead = stack_axes(name)
    layer = shape[lead:]
    if len(axes) > len(layer):
        raise ValueError(
            f"the rule for {name!r} speaks of {len(axes)} axes, but one layer of it has shape"
            f" {layer}"
        )
    spec: list[str | None] = [*axes, *[None] * (len(layer) - len(axes))]
    # An axis that does not divide is replicated, unless the array is too large for that. Then
    # another axis is sharded, such as the inputs of fewer key-value heads than `model`, whose
    # partial products are summed.
    for place, axis in enumerate(spec):
        if axis is not None and layer[place] % mesh.shape[axis]:
            spec[place] = None
            other = _largest_free(layer, spec, axis, mesh)
            if other is None:
                _require_small(name, shape, axis, mesh)
            elif math.prod(shape) > LARGE:
                spec[other] = axis
    # Vectors are not sharded over fsdp: gathering each would cost a message for few bytes.
    if gathered and len(layer) > 1 and mesh.shape[FSDP] > 1:
        free = _largest_free(layer, spec, FSDP, mesh)
        if free is None:
            _require_small(name, shape, FSDP, mesh)
        else:
            spec[free] = FSDP
    # Mesh axes of a single device shard nothing and are left out.
    return PartitionSpec(
        *[None] * lead,
        *[axis if axis is not None and mesh.shape[axis] > 1 else None for axis in spec],
    )


def _largest_free(
    shape: tuple[int, ...], spec: Sequence[str | None], axis: str, mesh: Mesh
) -> int | None:
    """Returns the largest axis of one layer's array that is not sharded yet and that a mesh axis
    divides; None if there is none.
    """
    count = mesh.shape[axis]
    free = [p for p, taken in enumerate(spec) if taken is None and shape[p] % count == 0]
    return max(free, key=lambda place: shape[place]) if free else None


def _require_small(name: str, shape: tuple[int, ...], axis: str, mesh: Mesh) -> None:
    """Raises UserError for an array that is too large to be replicated over a mesh axis."""
    if math.prod(shape) > LARGE:
        raise UserError(
            f"{name!r} with shape {shape} cannot be sharded over {axis}={mesh.shape[axis]} and"
            f" would be whole on every device: choose a config.mesh.{axis} that divides one of"
            " its axes"
        )
