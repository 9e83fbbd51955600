"""Weights of several arrays by the names of these: a low-rank update beside a frozen matrix, or
integers and their scales (`flamingo_jax.models.weights`).

The arrays stand below the weight's own name, `layers/attention/query/lora_up`, which every table
of rules speaks of; what differs between them is declared here alone.
"""

from collections.abc import Callable
from typing import NamedTuple

Axes = tuple[str | None, ...]
"""The mesh axis of each of an array's axes; those past the end are on none."""


class WeightPart(NamedTuple):
    """One of a weight's arrays. trains: whether it does, whatever the weight's rule says. axes:
    the mesh axes of the array from those of the whole weight (inputs, then outputs) and its own
    number of axes. product: it meets activations in a product of its own.
    """

    trains: bool
    axes: Callable[[Axes, int], Axes]
    product: bool = True


def _same(axes: Axes, count: int) -> Axes:
    return axes


def _inputs_and_rank(axes: Axes, count: int) -> Axes:
    return (*axes[: count - 1], None) if axes else axes


def _rank_and_outputs(axes: Axes, count: int) -> Axes:
    return (None, *axes[len(axes) - (count - 1) :]) if axes else axes


def _outputs(axes: Axes, count: int) -> Axes:
    return axes[len(axes) - count :] if axes else axes


WEIGHT_PARTS = {
    "base": WeightPart(False, _same),
    "lora_down": WeightPart(True, _inputs_and_rank),
    "lora_up": WeightPart(True, _rank_and_outputs),
    "int8": WeightPart(False, _same),
    "int8_scale": WeightPart(False, _outputs, product=False),
}
"""By the last component of a name. base: what a low-rank update is added to, an array or
integers. lora_down [inputs, rank] and lora_up [rank, outputs]. int8 and the float scale of each
of its outputs.
"""


def weight_name(name: str) -> str:
    """The weight that an array belongs to: "query/base/int8" -> "query"; others as they are."""
    while (found := name.rpartition("/"))[2] in WEIGHT_PARTS:
        name = found[0]
    return name


def weight_part(name: str) -> WeightPart | None:
    """What an array is of its weight; None where it is all of it."""
    return WEIGHT_PARTS.get(name.rpartition("/")[2])


def meets(name: str) -> bool:
    """Whether an array meets activations in a product."""
    part = weight_part(name)
    return part is None or part.product


def is_update(name: str) -> bool:
    """Whether an array is of a trained update beside a frozen weight."""
    part = weight_part(name)
    return part is not None and part.trains


def stored_name(name: str) -> str:
    """The name that a frozen array has in files, where weights are whole: "query/base" ->
    "query".
    """
    return name.removesuffix("/base")
