"""The arrays of weights that have several (LoRA, int8 with scales;
`flamingo_jax.models.weights`), recognised by parameter names.

Their names are below the weight's own, as in `layers/attention/query/lora_up`. Tables of rules
mention only the weight, `layers/attention/query`; how its arrays differ from it in training
and sharding is declared here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

Axes = tuple[str | None, ...]
"""The mesh axis that shards each axis of an array, or None; missing ones are None."""


class WeightPart(NamedTuple):
    """One of a weight's arrays.

    trains: whether it is trained, whatever the weight's rule says.
    axes: computes the array's mesh axes from those of the whole weight (inputs, then outputs)
      and its own number of axes.
    product: whether activations are multiplied with it in a matrix product, for FLOPs.
    dtype: its dtype, whatever the weight's; None for the weight's.
    """

    trains: bool
    axes: Callable[[Axes, int], Axes]
    product: bool = True
    dtype: str | None = None


def _same(axes: Axes, count: int) -> Axes:
    return axes


def _inputs_and_rank(axes: Axes, count: int) -> Axes:
    return (*axes[: count - 1], None) if axes else axes


def _rank_and_outputs(axes: Axes, count: int) -> Axes:
    return (None, *axes[len(axes) - (count - 1) :]) if axes else axes


def _outputs(axes: Axes, count: int) -> Axes:
    return axes[len(axes) - count :] if axes else axes


def _rows(axes: Axes, count: int) -> Axes:
    return axes[:count]


WEIGHT_PARTS = {
    "base": WeightPart(False, _same),
    "lora_down": WeightPart(True, _inputs_and_rank),
    "lora_up": WeightPart(True, _rank_and_outputs),
    "int8": WeightPart(False, _same, dtype="int8"),
    "int8_scale": WeightPart(False, _outputs, product=False, dtype="float32"),
    "int8_row_scale": WeightPart(False, _rows, product=False, dtype="float32"),
    "int8_filter_scale": WeightPart(False, _outputs, product=False, dtype="float32"),
}
"""{last component of the name: part}. base: the matrix that a low-rank update is added to,
dense or int8. lora_down: [inputs, rank]. lora_up: [rank, outputs]. int8: [inputs, outputs].
int8_scale: [outputs]. int8_row_scale: [V] of an embedding table [V, D]. int8_filter_scale:
[outputs] of a convolution's filters.
"""


def weight_name(name: str) -> str:
    """Returns the weight that an array belongs to: "query/base/int8" -> "query"; other names
    as they are.
    """
    while (found := name.rpartition("/"))[2] in WEIGHT_PARTS:
        name = found[0]
    return name


def weight_part(name: str) -> WeightPart | None:
    """Returns an array's part of its weight; None where it is the whole weight."""
    return WEIGHT_PARTS.get(name.rpartition("/")[2])


def is_multiplied(name: str) -> bool:
    """Returns whether activations are multiplied with an array in a matrix product."""
    part = weight_part(name)
    return part is None or part.product


def is_update(name: str) -> bool:
    """Returns whether an array belongs to a trained low-rank update of a frozen weight."""
    part = weight_part(name)
    return part is not None and part.trains


def stored_name(name: str) -> str:
    """Returns the name of a frozen array without updates, as in files: "query/base" ->
    "query", "query/base/int8" -> "query/int8".
    """
    weight, part = weight_and_part(name)
    if part == "base":
        return weight
    return f"{stored_name(weight)}/{part}" if part else name


def dtype_of(name: str, dtype: Any) -> Any:
    """Returns the dtype of a frozen array: that of the part, or `dtype` where the part has
    none of its own.
    """
    part = weight_part(name)
    return (part and part.dtype) or dtype


def weight_and_part(name: str) -> tuple[str, str]:
    """Splits an array's name into its weight's and its part's: "query/int8" -> ("query",
    "int8"); ("query", "") for "query".
    """
    weight, _, part = name.rpartition("/")
    return (weight, part) if part in WEIGHT_PARTS else (name, "")


def float_name(name: str) -> str:
    """Returns the name of the float array that an array is quantised from: its weight's, where
    it is a part of an int8 weight, otherwise its own.
    """
    part = weight_part(name)
    return name.rpartition("/")[0] if part and part.dtype else name


def is_scale(name: str) -> bool:
    """Returns whether an array holds the scales of the integers beside it."""
    part = weight_part(name)
    return part is not None and not part.product
