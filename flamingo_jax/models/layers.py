"""The small parts that all models share.

Modules compute in the dtype of their activations and cast weights at use.
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
    """A weight that is more than one array, as `models.weights` has them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole weight: inputs, then outputs."""
        ...

    def product(self, x: Array, contract: int) -> Array:
        """`linear(x, self, contract)`."""
        ...

    def dense(self) -> Array:
        """The whole weight as one array."""
        ...


def linear(x: Array, weight: Array | nnx.Variable | Weight, contract: int = 1) -> Array:
    """Contracts the last `contract` axes of `x` with the first of a weight: the only place where
    a weight meets an activation.

    An array of another type is cast to the activation's, and its gradient is summed in the
    weight's: over rows, and over the devices that have them, which the compiler does before any
    cast that follows the product.
    """
    if isinstance(weight, Weight):
        return weight.product(x, contract)
    w = weight[...]
    return ops.matmul(x, w, contract) if w.dtype == x.dtype else _cast_product(x, w, contract)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cast_product(x: Array, w: Array, contract: int) -> Array:
    return ops.matmul(x, w, contract)


def _cast_forward(x: Array, w: Array, contract: int) -> tuple[Array, tuple[Array, Array]]:
    return ops.matmul(x, w, contract), (x, w)


def _cast_backward(contract: int, given: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = given
    (dx,) = jax.linear_transpose(lambda x: ops.matmul(x, w, contract), x)(dy)
    return dx, _weight_gradient(x, dy, w, contract)


_cast_product.defvjp(_cast_forward, _cast_backward)


def _weight_gradient(x: Array, dy: Array, w: Array, contract: int) -> Array:
    """x^T dy, the gradient of `w` in linear(x, w), in the type of `w`."""
    if w.dtype == x.dtype:
        return jax.linear_transpose(lambda w: ops.matmul(x, w, contract), w)(dy)[0]
    rows = tuple(range(x.ndim - contract))
    return jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=w.dtype)


def broadcast_param(parameter: Array, x: Array) -> Array:
    """A parameter to be added to `x`, or multiplied with it, in the type of `x`: as large
    before the cast, so that its gradient is summed in the parameter's own type.
    """
    if parameter.dtype == x.dtype:
        return parameter
    return jnp.broadcast_to(parameter, jnp.broadcast_shapes(parameter.shape, x.shape)).astype(
        x.dtype
    )


def add_bias(x: Array, bias: nnx.Param) -> Array:
    """`x` plus a bias over its last axes, in the type of `x`."""
    return x + broadcast_param(bias[...], x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def gated_linear(x: Array, w: Array, gate: Array, contract: int = 1) -> Array:
    """gate * linear(x, w) for a scalar gate.

    The gate's gradient <dy, x w> is taken as <x^T dy, w>: the product is neither kept for it
    nor computed again.
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
    return (
        gate.astype(dx.dtype) * dx,
        gate.astype(dw.dtype) * dw,
        jnp.vdot(dw.astype(jnp.float32), w.astype(jnp.float32)).astype(gate.dtype),
    )


gated_linear.defvjp(_gated_forward, _gated_backward)

SAVED = "saved_for_backward"
"""Name of what `remat` saves in its mode "products"."""


def save_for_backward(x: Array) -> Array:
    """Marks what is dear to compute again: products with weights and sums over the mesh."""
    return checkpoint_name(x, SAVED)


def remat(body: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """`body` with less saved for its gradient: "none" saves all that is needed, "products"
    (nearly) the products with weights alone, so that nothing but norms, activations and
    attention's weights is computed twice, "layers" nothing but the body's arguments.
    """
    if mode == "none":
        return body
    policy = jax.checkpoint_policies.save_only_these_names(SAVED) if mode == "products" else None
    # Within a scan nothing is merged across iterations, so that the barriers against it would
    # only cost.
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def zero_nonfinite(x: Array, axes: tuple[int, ...] | int) -> tuple[Array, Array]:
    """`x` with zeros for all that is not finite along `axes` (one number is enough), and bool,
    without those axes, where that is.

    Before an arithmetic that masks by zeros: 0 x NaN is NaN, and so is the gradient of what is
    multiplied with it.
    """
    whole = jnp.isfinite(x).all(axes, keepdims=True)
    return jnp.where(whole, x, jnp.zeros((), x.dtype)), ~jnp.squeeze(whole, axes)


def fan_in_normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int | None = None, scale: float = 1.0
) -> nnx.Param:
    """Normal weights truncated at two deviations, with deviation scale / sqrt(fan_in); fan_in
    is by default the first axis.
    """
    deviation = scale / math.sqrt(shape[0] if fan_in is None else fan_in)
    return nnx.Param(
        jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32)
        * (deviation / 0.87962566)
    )


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis with a scale and, by default, a bias; statistics in
    float32.
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
    """The norm of a language model's kind over a last axis of this width."""
    if config.kind == "rms":
        return RMSNorm(width, config.eps)
    return LayerNorm(width, config.eps, bias=config.bias)


class FeedForward(nnx.Module):
    """Two linear maps with an activation between them; biases only where asked for.

    Gated: down(activation(gate(x)) * up(x)).
    """

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
        """[..., D] -> [..., D]; a scalar gate, where there is one, multiplies the last product,
        and not its bias.
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
    """`count` layers as one module whose every parameter has a leading layer axis; hold it in
    an attribute named `layers`.
    """

    def parameters(key: Array) -> nnx.State:
        return nnx.split(make_layer(nnx.Rngs(params=key)))[1]

    graph = nnx.split(nnx.eval_shape(lambda: make_layer(nnx.Rngs(params=jax.random.key(0)))))[0]
    return nnx.merge(graph, jax.vmap(parameters)(jax.random.split(rngs.params(), count)))


def scan_layers(
    stacked: nnx.Module,
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    inputs: Any = None,
    remat_mode: str = "none",
) -> tuple[Any, Any]:
    """`carry, output = body(layer, carry, input)` over the layers of `stacked` in order,
    compiled once whatever their number.

    remat_mode: what of a layer is computed again for the gradient, see `remat`.
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
