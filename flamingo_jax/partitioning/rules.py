"""Ordered tables of (regular expression, rule) over parameter names, first match wins: what is trained, and how it is sharded.

A parameter that no rule matches and a rule that matches nothing are errors that name it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flamingo_jax.errors import UserError

Rule = TypeVar("Rule")
Table = Sequence[tuple[str, Rule]]

TRAINED: dict[str, Table[bool]] = {
    "contrastive": ((".*", True),),
    "language_modelling": ((".*", True),),
    "flamingo": (
        ("vision_encoder/.*", False),
        ("language_model/.*", False),
        ("resampler/.*", True),
        ("visual_projection", True),
        ("gated_xattn/.*", True),
        ("extra_embedding", True),
    ),
}
"""By task (paper: both backbones are frozen)."""

# Axes count from the end, so that a stack's leading layer axis does not matter. Megatron: heads and hidden units over `model`.
_TRANSFORMER: Table[tuple[int, str] | None] = (
    (r".*attention/(query|key|value|position)", (-2, "model")),
    (r".*attention/out", (-3, "model")),
    (r".*attention/(content|position)_bias", (-2, "model")),
    (r".*feed_forward/up", (-1, "model")),
    (r".*feed_forward/down", (-2, "model")),
)
_LANGUAGE_MODEL: Table[tuple[int, str] | None] = (
    (r".*/?embedding", (-2, "model")),
    (r".*/?head", (-1, "model")),
    *_TRANSFORMER,
    (r".*norm/(scale|bias)", None),
)
SHARDED: dict[str, Table[tuple[int, str] | None]] = {
    "contrastive": ((".*", None),),
    "language_modelling": _LANGUAGE_MODEL,
    "flamingo": (
        (r"vision_encoder/.*", None),
        (r"resampler/.*", None),
        (r"visual_projection", None),
        (r"extra_embedding", None),
        (r"gated_xattn/layers/(query|key|value)", (-2, "model")),
        (r"gated_xattn/layers/out", (-3, "model")),
        (r"gated_xattn/layers/.*_gate", None),
        (r"gated_xattn/layers/feed_forward/up", (-1, "model")),
        (r"gated_xattn/layers/feed_forward/down", (-2, "model")),
        *_LANGUAGE_MODEL,
    ),
}
"""By task: the axis of a parameter that lies over a mesh axis, or None. `fsdp` takes the largest axis that is left."""

OPTIONAL = {r".*/?head", r".*attention/(content|position)_bias"}
"""Rules for parts that a model need not have."""
SMALL = 2**16
"""Parameters with fewer elements than this are not sharded over `fsdp`: gathering them costs more than they take."""


def match(table: Table[Rule], names: Sequence[str], what: str) -> dict[str, Rule]:
    """The rule of every name; a UserError for a name without one or a rule without a name."""
    found: dict[str, Rule] = {}
    unused = {pattern for pattern, _ in table} - OPTIONAL
    for name in names:
        for pattern, rule in table:
            if re.fullmatch(pattern, name):
                found[name] = rule
                unused.discard(pattern)
                break
        else:
            raise UserError(f"no {what} rule matches the parameter {name}: add one to flamingo_jax/partitioning/rules.py")
    if unused:
        raise UserError(f"the {what} rule {sorted(unused)[0]!r} matches no parameter: mend or remove it in flamingo_jax/partitioning/rules.py")
    return found


def trainable_names(task: str, shapes: Mapping[str, Any]) -> set[str]:
    """The parameters that the task trains."""
    return {name for name, trained in match(TRAINED[task], list(shapes), "training").items() if trained}


def shardings(task: str, shapes: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Every parameter's sharding; a UserError where an axis does not divide over the mesh."""
    rules = match(SHARDED[task], list(shapes), "sharding")
    return {name: NamedSharding(mesh, _spec(name, shapes[name].shape, rules[name], mesh)) for name in shapes}


def _spec(name: str, shape: tuple[int, ...], rule: tuple[int, str] | None, mesh: Mesh) -> PartitionSpec:
    axes: list[str | None] = [None] * len(shape)
    if rule is not None:
        axis, over = rule
        if shape[axis] % mesh.shape[over]:
            raise UserError(
                f"{name} has {shape[axis]} entries along the axis that lies over mesh.{over} = {mesh.shape[over]}, which does not divide them: make mesh.{over} smaller"
            )
        axes[axis] = over
    size = 1
    for extent in shape:
        size *= extent
    # A stack's first axis is its layers: a scan reads one at a time, so it stays whole.
    first = 1 if "layers/" in name else 0
    free = [place for place in range(first, len(shape)) if axes[place] is None and shape[place] % mesh.shape["fsdp"] == 0]
    if size >= SMALL and free:
        axes[max(free, key=lambda place: shape[place])] = "fsdp"
    return PartitionSpec(*axes)
