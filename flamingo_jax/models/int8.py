"""Frozen weights as int8 with float32 scales: matrices, embedding tables and the standardised
filters of convolutions; and which weights of a model are kept so.

Integers up to 127 are exact in bfloat16, so that a product in bfloat16 adds only its own
rounding to the quantisation's. XLA fuses the conversion into the product where it can;
elsewhere it converts one layer's matrix at a time, never a whole stack: the backward pass
keeps the integers and converts them again.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flamingo_jax.models import ops
from flamingo_jax.models.layers import FILTER_AXES, standardise

Array = jax.Array

LARGEST = 127
"""The largest integer: symmetric, -127 .. 127."""


class Quantised(NamedTuple):
    """Integers and the scales of their channels: arrays, their shapes or their shardings.

    int8: in the shape of the weight. scale: float32, in that shape without a channel's axes.
    """

    int8: Any
    scale: Any


def quantise(weight: Array, axes: tuple[int, ...]) -> Quantised:
    """Rounds a weight of any float dtype to integers, symmetrically: a channel's scale is its
    largest absolute value / 127 (1 / 127 for a channel of zeros). The arithmetic is float32.

    axes: those that a channel spans, which share a scale.
    """
    w = weight.astype(jnp.float32)
    largest = jnp.abs(w).max(axes, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / LARGEST
    return Quantised(jnp.round(w / scale).astype(jnp.int8), jnp.squeeze(scale, axes))


def matrix_axes(stacked: int, inputs: int) -> tuple[int, ...]:
    """Returns the axes that an output channel of a matrix spans: its inputs, which follow the
    layer axes.
    """
    return tuple(range(stacked, stacked + inputs))


TABLE_AXES = (-1,)
"""A row of an embedding table [V, D] is a channel: what a token looks up, and what its logit is
computed with.
"""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def int8_product(x: Array, int8: Array, scale: Array, contract: int) -> Array:
    """Multiplies activations with a matrix of integers, then the outputs with their scales:
    x [..., inputs] -> [..., outputs] in the dtype of `x`. Only `x` has a gradient.

    contract: how many axes are inputs.
    """
    return (ops.matmul(x, int8, contract) * scale).astype(x.dtype)


def _product_forward(
    x: Array, int8: Array, scale: Array, contract: int
) -> tuple[Array, tuple[Array, Array]]:
    return int8_product(x, int8, scale, contract), (int8, scale)


def _product_backward(
    contract: int, given: tuple[Array, Array], dy: Array
) -> tuple[Array, None, None]:
    int8, scale = given
    lead = dy.shape[: dy.ndim - scale.ndim]
    x = jax.ShapeDtypeStruct((*lead, *int8.shape[:contract]), dy.dtype)
    product = jax.linear_transpose(lambda x: ops.matmul(x, int8, contract), x)
    return (*product((dy * scale).astype(dy.dtype)), None, None)


int8_product.defvjp(_product_forward, _product_backward)


class Int8Weight(nnx.Module):
    """A frozen matrix as int8 with a float32 scale per output channel.

    It has no gradient itself, but passes on that of the activations.

    Args:
      weight: [inputs..., outputs...], or a stack of them with leading layer axes.
      inputs: how many axes are inputs.
      stacked: how many leading axes are layers.
    """

    def __init__(self, weight: Array, inputs: int, *, stacked: int = 0):
        found = quantise(weight, matrix_axes(stacked, inputs))
        self.int8, self.int8_scale = nnx.Param(found.int8), nnx.Param(found.scale)
        self.outputs = weight.ndim - stacked - inputs

    @property
    def shape(self) -> tuple[int, ...]:
        return self.int8.shape

    def product(self, x: Array, contract: int) -> Array:
        """Computes `linear`, x [..., inputs] -> [..., outputs] in the dtype of `x`: the
        product with the integers, then the scales per output channel.
        """
        return int8_product(x, self.int8[...], self.int8_scale[...], contract)

    def dense(self) -> Array:
        """Returns the dequantised matrix, float32."""
        # Scales [layers..., outputs...] -> [layers..., 1..., outputs...]
        scale = self.int8_scale[...]
        lead = scale.ndim - self.outputs
        inputs = self.int8.ndim - scale.ndim
        scale = scale.reshape(*scale.shape[:lead], *(1,) * inputs, *scale.shape[lead:])
        return self.int8[...].astype(jnp.float32) * scale


class Int8Table(nnx.Module):
    """A frozen embedding table [V, D] as int8 with a float32 scale per row, for looking up
    rows and, where it is tied to the output head, for logits.
    """

    def __init__(self, table: Array):
        found = quantise(table, TABLE_AXES)
        self.int8, self.int8_row_scale = nnx.Param(found.int8), nnx.Param(found.scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.int8.shape

    def rows(self, tokens: Array) -> Array:
        """Looks rows up: int32 [...] -> float32 [..., D]."""
        scale = self.int8_row_scale[...][tokens]
        return self.int8[...][tokens].astype(jnp.float32) * scale[..., None]

    def unembed(self, x: Array) -> Array:
        """Multiplies x [..., D] with every row -> [..., V], in the dtype of `x`."""
        return int8_product(x, self.int8[...].T, self.int8_row_scale[...], 1)

    def dense(self) -> Array:
        """Returns the dequantised table, float32."""
        return self.int8[...].astype(jnp.float32) * self.int8_row_scale[...][:, None]


class Int8Filters(nnx.Module):
    """Frozen filters [..., h, w, inputs, outputs] of a convolution with weight
    standardisation, standardised (without the gain) and then quantised, with a float32 scale
    per output channel.

    In this order, since standardising what was quantised would need float filters at every
    call, and its statistics would be those of the rounded weights.
    """

    def __init__(self, weight: Array):
        found = quantise(standardise(weight), FILTER_AXES)
        self.int8, self.int8_filter_scale = nnx.Param(found.int8), nnx.Param(found.scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.int8.shape

    def dense(self) -> Array:
        """Returns the dequantised standardised filters, float32."""
        scale = self.int8_filter_scale[...]
        return self.int8[...].astype(jnp.float32) * jnp.expand_dims(scale, FILTER_AXES)


STORED: dict[str, Callable[[Array, int, int], Quantised]] = {
    "int8_scale": lambda w, stacked, inputs: quantise(w, matrix_axes(stacked, inputs)),
    "int8_row_scale": lambda w, stacked, inputs: quantise(w, TABLE_AXES),
    "int8_filter_scale": lambda w, stacked, inputs: quantise(standardise(w), FILTER_AXES),
}
"""{name of the scales of a kind of weight: how the weight is quantised as it is stored in files
(weight, leading layer axes, input axes)}: what the classes above do, for a reader that knows
parameters by name alone.
"""
