"""The layers that all models share: linear maps, norms, feed-forward, scanned layer stacks,
rematerialisation.

Modules compute in the dtype of their activations; float32 parameters are cast where they are
used, so that their gradients are accumulated in float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flamingo_jax.models import ops
from flamingo_jax.models.language_model_config import NormConfig

Array = jax.Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.nn.gelu,
    "exact_gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
}


@runtime_checkable
class Weight(Protocol):
    """A weight made of several arrays, such as a matrix with LoRA: see `models.weights`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the equivalent dense array: inputs, then outputs."""
        ...

    def product(self, x: Array, contract: int) -> Array:
        """Computes `linear(x, self, contract)`."""
        ...

    def dense(self) -> Array:
        """Returns the equivalent dense array."""
        ...


@runtime_checkable
class WeightTable(Protocol):
    """An embedding table [V, D] made of several arrays: see `models.int8`."""

    def rows(self, tokens: Array) -> Array:
        """Computes `lookup(self, tokens)`."""
        ...

    def unembed(self, x: Array) -> Array:
        """Computes `unembed(x, self)`."""
        ...


def lookup(table: nnx.Variable | WeightTable, tokens: Array) -> Array:
    """Looks up rows of an embedding table [V, D]: int32 [...] -> [..., D]."""
    return table.rows(tokens) if isinstance(table, WeightTable) else table[...][tokens]


def unembed(x: Array, table: nnx.Variable | WeightTable) -> Array:
    """Multiplies activations with every row of an embedding table [V, D]: x [..., D] ->
    [..., V], the output head that is tied to it.
    """
    return table.unembed(x) if isinstance(table, WeightTable) else linear(x, table[...].T)


def linear(x: Array, weight: Array | nnx.Variable | Weight, contract: int = 1) -> Array:
    """Multiplies activations with a weight: contracts the last `contract` axes of `x` with the
    first axes of the weight. Every matrix product with a weight in this library goes through
    here.

    A weight of another dtype is cast to the activations', but its gradient is accumulated in
    its own: over rows, and over devices. (With a plain cast the compiler would sum the
    gradient over devices in the activations' dtype, before the cast's gradient.)
    """
    if isinstance(weight, Weight):
        return weight.product(x, contract)
    w = weight[...]
    return ops.matmul(x, w, contract) if w.dtype == x.dtype else _cast_product(x, w, contract)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cast_product(x: Array, w: Array, contract: int) -> Array:
    """Multiplies with `w` cast to the dtype of `x`; the gradient of `w` has the dtype of `w`."""
    return ops.matmul(x, w, contract)


def _cast_forward(x: Array, w: Array, contract: int) -> tuple[Array, tuple[Array, Array]]:
    return ops.matmul(x, w, contract), (x, w)


def _cast_backward(contract: int, given: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = given
    (dx,) = jax.linear_transpose(lambda x: ops.matmul(x, w, contract), x)(dy)
    return dx, _weight_gradient(x, dy, w, contract)


_cast_product.defvjp(_cast_forward, _cast_backward)


def _weight_gradient(x: Array, dy: Array, w: Array, contract: int) -> Array:
    """Computes x^T dy, the gradient of `w` in linear(x, w), in the dtype of `w`."""
    if w.dtype == x.dtype:
        return jax.linear_transpose(lambda w: ops.matmul(x, w, contract), w)(dy)[0]
    # [rows, inputs] x [rows, outputs] -> [inputs, outputs], accumulated in float32.
    rows = tuple(range(x.ndim - contract))
    return jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=w.dtype)


def broadcast_param(parameter: Array, x: Array) -> Array:
    """Broadcasts a parameter to the shape of `x` and casts it to the dtype of `x`.

    In this order, so that the gradient is summed over the broadcast axes after it is cast
    back, in the parameter's own dtype.
    """
    if parameter.dtype == x.dtype:
        return parameter
    return jnp.broadcast_to(parameter, jnp.broadcast_shapes(parameter.shape, x.shape)).astype(
        x.dtype
    )


def add_bias(x: Array, bias: nnx.Param) -> Array:
    """Adds a bias over the last axes of `x`, in the dtype of `x`."""
    return x + broadcast_param(bias[...], x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def gated_linear(x: Array, w: Array, gate: Array, contract: int = 1) -> Array:
    """Computes gate * linear(x, w) for a scalar gate.

    The gate's gradient <dy, x w> is computed as <x^T dy, w>, from the weight's gradient, so
    that the product x w is neither saved for the backward pass nor recomputed.
    """
    return gate.astype(x.dtype) * linear(x, w, contract)


def _gated_forward(
    x: Array, w: Array, gate: Array, contract: int
) -> tuple[Array, tuple[Array, Array, Array]]:
    return gated_linear(x, w, gate, contract), (x, w, gate)


def _gated_backward(
    contract: int, given: tuple[Array, Array, Array], dy: Array
) -> tuple[Array, Array, Array]:
    x, w, gate = given
    (dx,) = jax.linear_transpose(lambda x: ops.matmul(x, w, contract), x)(dy)
    dw = _weight_gradient(x, dy, w, contract)
    # Gradients of x, w and the gate.
    return (
        gate.astype(dx.dtype) * dx,
        gate.astype(dw.dtype) * dw,
        jnp.vdot(dw.astype(jnp.float32), w.astype(jnp.float32)).astype(gate.dtype),
    )


gated_linear.defvjp(_gated_forward, _gated_backward)

SAVED = "saved_for_backward"
"""The checkpoint name of the arrays that `remat` saves in its mode "products"."""


def save_for_backward(x: Array) -> Array:
    """Marks an array as expensive to recompute: products with weights, sums over the mesh."""
    return checkpoint_name(x, SAVED)


def remat(body: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """Wraps `body` in `jax.checkpoint` by a mode, which says what the backward pass
    recomputes.

    "none": nothing. "products": norms, activation functions and attention weights; most
    products with weights are saved. "layers": the whole body; only its arguments are saved.
    """
    if mode == "none":
        return body
    policy = jax.checkpoint_policies.save_only_these_names(SAVED) if mode == "products" else None
    # The barriers of `prevent_cse` are only needed outside of a scan: across its iterations
    # XLA eliminates no common subexpressions.
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def zero_nonfinite(x: Array, axes: tuple[int, ...] | int) -> tuple[Array, Array]:
    """Zeroes every slice of `x` along `axes` that has a NaN or infinity, and says which: `x`,
    and a bool array without these axes, True for a zeroed slice.

    To be called before values are masked by multiplying with zero: 0 x NaN is NaN, in the
    forward pass and in the gradient.
    """
    whole = jnp.isfinite(x).all(axes, keepdims=True)
    return jnp.where(whole, x, jnp.zeros((), x.dtype)), ~jnp.squeeze(whole, axes)


def fan_in_normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int | None = None, scale: float = 1.0
) -> nnx.Param:
    """Draws a weight, float32, from a normal distribution of standard deviation scale /
    sqrt(fan_in), truncated at two deviations. fan_in: by default the first axis.
    """
    deviation = scale / math.sqrt(shape[0] if fan_in is None else fan_in)
    # 0.8796... is the deviation of a standard normal truncated at 2.
    return nnx.Param(
        jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32)
        * (deviation / 0.87962566)
    )


FILTER_AXES = (-4, -3, -2)
"""The axes of a convolution's filters [..., h, w, inputs, outputs] that an output channel
spans.
"""


def standardise(filters: Array, gain: Array | None = None) -> Array:
    """Normalises the filters of every output channel to mean 0 and variance gain^2 / fan-in,
    float32: scaled weight standardisation (Brock et al. 2021).

    gain: [..., outputs]; by default 1.
    """
    w = filters.astype(jnp.float32)
    mean, variance = w.mean(FILTER_AXES, keepdims=True), w.var(FILTER_AXES, keepdims=True)
    factor = jax.lax.rsqrt(jnp.maximum(variance * math.prod(w.shape[-4:-1]), 1e-4))
    if gain is not None:
        factor = jnp.expand_dims(gain.astype(jnp.float32), FILTER_AXES) * factor
    return (w - mean) * factor


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis with a scale and, by default, a bias; statistics
    in float32.
    """

    def __init__(self, width: int, eps: float = 1e-5, *, bias: bool = True):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,))) if bias else None
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        h = ops.drop_unit_axes(x).astype(jnp.float32)
        h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
        h = h * self.scale[...]
        h = h if self.bias is None else h + self.bias[...]
        return h.astype(x.dtype).reshape(x.shape)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis with a scale; statistics in float32."""

    def __init__(self, width: int, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        h = ops.drop_unit_axes(x).astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
        return (h * self.scale[...]).astype(x.dtype).reshape(x.shape)


def make_norm(config: NormConfig, width: int) -> RMSNorm | LayerNorm:
    """Makes the norm that a language model's config names, over a last axis of this width."""
    if config.kind == "rms":
        return RMSNorm(width, config.eps)
    return LayerNorm(width, config.eps, bias=config.bias)


class FeedForward(nnx.Module):
    """Feed-forward: down(activation(up(x))), or gated: down(activation(gate(x)) * up(x))."""

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: str,
        *,
        bias: bool = False,
        gated: bool = False,
        rngs: nnx.Rngs,
    ):
        self.gate = fan_in_normal(rngs, (width, hidden)) if gated else None
        self.up = fan_in_normal(rngs, (width, hidden))
        self.down = fan_in_normal(rngs, (hidden, width))
        self.up_bias = nnx.Param(jnp.zeros((hidden,))) if bias else None
        self.down_bias = nnx.Param(jnp.zeros((width,))) if bias else None
        self.activation = activation

    def __call__(self, x: Array, gate: Array | None = None) -> Array:
        """Maps x [..., D] -> [..., D].

        gate: a scalar that the last product is multiplied with, its bias not (the tanh gate of
          cross-attention blocks; not `self.gate`, the gated form's weight).
        """
        h = save_for_backward(linear(x, self.up))
        if self.up_bias is not None:
            h = h + broadcast_param(self.up_bias[...], h)
        activate = ACTIVATIONS[self.activation]
        h = (
            activate(h)
            if self.gate is None
            else activate(save_for_backward(linear(x, self.gate))) * h
        )
        h = linear(h, self.down) if gate is None else gated_linear(h, self.down[...], gate)
        if self.down_bias is not None:
            h = h + broadcast_param(self.down_bias[...], h)
        return h


def stack(make_layer: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> Any:
    """Makes `count` layers as one module whose parameters have a leading layer axis, for
    `scan_layers`. The attribute that holds it must be named `layers`, by which checkpoints and
    partition rules recognise the axis.
    """

    def parameters(key: Array) -> nnx.State:
        return nnx.split(make_layer(nnx.Rngs(params=key)))[1]

    # The structure comes from an abstract layer; only the vmapped parameters are allocated.
    graph = nnx.split(nnx.eval_shape(lambda: make_layer(nnx.Rngs(params=jax.random.key(0)))))[0]
    return nnx.merge(graph, jax.vmap(parameters)(jax.random.split(rngs.params(), count)))


def scan_layers(
    stacked: nnx.Module,
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    inputs: Any = None,
    remat_mode: str = "none",
) -> tuple[Any, Any]:
    """Runs `carry, output = body(layer, carry, input)` over the layers of `stacked` in order,
    as a `lax.scan`, so that one layer is compiled whatever their number.

    Args:
      stacked: of `stack`.
      inputs: each layer's input, leaves [layers, ...].
      remat_mode: what the backward pass recomputes, see `remat`.

    Returns: the last carry, and the outputs stacked, leaves [layers, ...].
    """
    graph, state = nnx.split(stacked)
    step = remat(lambda c, xs: body(nnx.merge(graph, xs[0]), c, xs[1]), remat_mode)
    if jax.tree.leaves(state)[0].shape[0] == 1:
        # XLA's CPU backend runs a convolution's gradient ten times slower inside a loop.
        first_state, first_input = jax.tree.map(lambda a: a[0], (state, inputs))
        carry, output = body(nnx.merge(graph, first_state), carry, first_input)
        return carry, jax.tree.map(lambda a: a[None], output)
    return jax.lax.scan(
        step, carry, (state, inputs), unroll=ops.scan_unroll(jax.tree.leaves(state)[0].shape[0])
    )
