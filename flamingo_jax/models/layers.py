"""The small parts that all models share.

Modules compute in the dtype of their activations and cast weights at use.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flamingo_jax.partitioning.constraints import platform

Array = jax.Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.nn.gelu,
    "exact_gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
}


def linear(x: Array, w: Array, contract: int = 1) -> Array:
    """Contracts the last `contract` axes of `x` with the first of `w`: the only place where a
    weight meets an activation.

    A weight of another type is cast to the activation's, and its gradient is summed in the
    weight's: over rows, and over the devices that have them, which the compiler does before any
    cast that follows the product.
    """
    return _product(x, w, contract) if w.dtype == x.dtype else _cast_product(x, w, contract)


def _product(x: Array, w: Array, contract: int) -> Array:
    if platform() != "cpu":
        # TPUs tile the last two axes: those that are no multiple of 8 (164 keys of an image)
        # would be copied to become one row axis.
        return jnp.tensordot(x, w.astype(x.dtype), contract)
    # As one matrix product: XLA's CPU backend is twice as slow at the gradient of a product
    # over several row axes.
    inner = math.prod(w.shape[:contract])
    product = x.reshape(-1, inner) @ w.astype(x.dtype).reshape(inner, -1)
    return product.reshape(*x.shape[: x.ndim - contract], *w.shape[contract:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cast_product(x: Array, w: Array, contract: int) -> Array:
    return _product(x, w, contract)


def _cast_forward(x: Array, w: Array, contract: int) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, w, contract), (x, w)


def _cast_backward(contract: int, given: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = given
    (dx,) = jax.linear_transpose(lambda x: _product(x, w, contract), x)(dy)
    return dx, _weight_gradient(x, dy, w, contract)


_cast_product.defvjp(_cast_forward, _cast_backward)


def _weight_gradient(x: Array, dy: Array, w: Array, contract: int) -> Array:
    """x^T dy, the gradient of `w` in linear(x, w), in the type of `w`."""
    if w.dtype == x.dtype:
        return jax.linear_transpose(lambda w: _product(x, w, contract), w)(dy)[0]
    rows = tuple(range(x.ndim - contract))
    return jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=w.dtype)


def spread(parameter: Array, x: Array) -> Array:
    """A parameter to be added to `x`, or multiplied with it, in the type of `x`: as large
    before the cast, so that its gradient is summed in the parameter's own type.
    """
    if parameter.dtype == x.dtype:
        return parameter
    return jnp.broadcast_to(parameter, jnp.broadcast_shapes(parameter.shape, x.shape)).astype(
        x.dtype
    )


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
    (dx,) = jax.linear_transpose(lambda x: _product(x, w, contract), x)(dy)
    dw = _weight_gradient(x, dy, w, contract)
    return (
        gate.astype(dx.dtype) * dx,
        gate.astype(dw.dtype) * dw,
        jnp.vdot(dw.astype(jnp.float32), w.astype(jnp.float32)).astype(gate.dtype),
    )


gated_linear.defvjp(_gated_forward, _gated_backward)

KEPT = "kept"
"""Name of what `rematerialised` keeps."""


def kept(x: Array) -> Array:
    """Marks what is dear to compute again: products with weights and sums over the mesh."""
    return checkpoint_name(x, KEPT)


def rematerialised(body: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """`body` with less saved for its gradient: "none" saves all that is needed, "products"
    (nearly) the products with weights alone, so that nothing but norms, activations and
    attention's weights is computed twice, "layers" nothing but the body's arguments.
    """
    if mode == "none":
        return body
    policy = jax.checkpoint_policies.save_only_these_names(KEPT) if mode == "products" else None
    # Within a scan nothing is merged across iterations, so that the barriers against it would
    # only cost.
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def finite(x: Array, axes: tuple[int, ...] | int) -> tuple[Array, Array]:
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


def squeezed(x: Array) -> Array:
    """On CPUs `x` without its axes of length 1 (the last stays): sums over axes that follow one
    take ten times as long there. Elsewhere `x` as it is.

    Rows are not put together: an axis made of two that lie over the mesh would have to be
    gathered.
    """
    ones = [axis for axis, size in enumerate(x.shape[:-1]) if size == 1]
    return jnp.squeeze(x, ones) if platform() == "cpu" else x


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis with scale and bias; statistics in float32."""

    def __init__(self, width: int, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        h = squeezed(x).astype(jnp.float32)
        h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
        return (h * self.scale[...] + self.bias[...]).astype(x.dtype).reshape(x.shape)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis with a scale; statistics in float32."""

    def __init__(self, width: int, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        h = squeezed(x).astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
        return (h * self.scale[...]).astype(x.dtype).reshape(x.shape)


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
        h = kept(linear(x, self.up[...]))
        if self.up_bias is not None:
            h = h + spread(self.up_bias[...], h)
        activate = ACTIVATIONS[self.activation]
        h = activate(h) if self.gate is None else activate(kept(linear(x, self.gate[...]))) * h
        h = linear(h, self.down[...]) if gate is None else gated_linear(h, self.down[...], gate)
        if self.down_bias is not None:
            h = h + spread(self.down_bias[...], h)
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
    remat: str = "none",
) -> tuple[Any, Any]:
    """`carry, output = body(layer, carry, input)` over the layers of `stacked` in order,
    compiled once whatever their number.

    remat: what of a layer is computed again for the gradient, see `rematerialised`.
    """
    graph, state = nnx.split(stacked)
    step = rematerialised(lambda c, xs: body(nnx.merge(graph, xs[0]), c, xs[1]), remat)
    if jax.tree.leaves(state)[0].shape[0] == 1:
        # XLA's CPU backend runs a convolution's gradient ten times slower inside a loop.
        first = lambda tree: jax.tree.map(lambda a: a[0], tree)
        carry, output = body(nnx.merge(graph, first(state)), carry, first(inputs))
        return carry, jax.tree.map(lambda a: a[None], output)
    return jax.lax.scan(
        step, carry, (state, inputs), unroll=at_once(jax.tree.leaves(state)[0].shape[0])
    )


def at_once(count: int) -> int:
    """How many of `count` layers an iteration of the loop over them runs: one, or on CPUs all
    where they are few. There a loop costs a third of small layers' time: what their gradient
    needs is written to stacks and read from them, one thread at a time. Of the fewest it is
    little, and compiling them apart takes longer than it saves.
    """
    return count if platform() == "cpu" and 4 <= count <= 8 else 1
