"""What differs by backend (CPU, GPU, TPU), so that no model asks for the platform.

Each function is the same mathematics everywhere, in the form that the platform's compiler makes
fast; the reasons are measurements of that compiler.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flamingo_jax.partitioning.constraints import platform

Array = jax.Array
AttentionKernel = Callable[[Array, Array, Array, Array | None, Array | None], Array]

MASKED = -1e30
"""Score of a key that may not be looked at: finite, so that a row of them has a softmax."""

CUDNN_WIDTH = 128
"""The widest heads that cuDNN's attention takes on every GPU with bfloat16."""


def matmul(x: Array, w: Array, contract: int = 1) -> Array:
    """Contracts the last `contract` axes of `x` with the first of `w`, in the type of `x`."""
    if platform() != "cpu":
        # TPUs tile the last two axes: those that are no multiple of 8 (164 keys of an image)
        # would be copied to become one row axis.
        return jnp.tensordot(x, w.astype(x.dtype), contract)
    # As one matrix product: XLA's CPU backend is twice as slow at the gradient of a product
    # over several row axes.
    inner = math.prod(w.shape[:contract])
    product = x.reshape(-1, inner) @ w.astype(x.dtype).reshape(inner, -1)
    return product.reshape(*x.shape[: x.ndim - contract], *w.shape[contract:])


def conv_operand(x: Array, result: DTypeLike) -> Array:
    """An array that a convolution with a result of this type takes: on GPUs cast to that type,
    since cuDNN has no form with a result wider than what it is given.
    """
    return x.astype(result) if platform() == "gpu" else x


def drop_unit_axes(x: Array) -> Array:
    """On CPUs `x` without its axes of length 1 (the last stays): sums over axes that follow one
    take ten times as long there. Elsewhere `x` as it is.

    Rows are not put together: an axis made of two that lie over the mesh would have to be
    gathered.
    """
    ones = [axis for axis, size in enumerate(x.shape[:-1]) if size == 1]
    return jnp.squeeze(x, ones) if platform() == "cpu" else x


def scan_unroll(count: int) -> int:
    """How many of `count` layers an iteration of the loop over them runs: one, or on CPUs all
    where they are few. There a loop costs a third of small layers' time: what their gradient
    needs is written to stacks and read from them, one thread at a time. Of the fewest it is
    little, and compiling them apart takes longer than it saves.
    """
    return count if platform() == "cpu" and 4 <= count <= 8 else 1


def attention_kernel(
    query: Array, key: Array, value: Array, extra_scores: Array | None
) -> AttentionKernel | None:
    """The backend's own form of `attention.attend` for arrays like these, which takes the same
    arguments; None where the reference is as fast.
    """
    if platform() == "cpu":
        return _keys_first_attention
    if platform() == "gpu" and extra_scores is None and _cudnn_takes(query, key, value):
        return _cudnn_attention
    return None


def repeat_heads(x: Array, query: Array) -> Array:
    """Keys or values [B, S, K, d] once for each of the H heads of queries [B, L, H, d] that
    share them: [B, S, H, d].
    """
    shared = query.shape[2] // x.shape[2]
    return jnp.repeat(x, shared, axis=2) if shared > 1 else x


def _keys_first_attention(
    query: Array, key: Array, value: Array, mask: Array | None, extra_scores: Array | None
) -> Array:
    """Attention in the order that XLA's CPU backend computes fast, its products' library taking
    the softmax into them: scores are [B, H, S, L], and what they weigh is divided by their sum
    rather than they.
    """
    key, value = repeat_heads(key, query), repeat_heads(value, query)
    batch = ((0, 1), (0, 1))
    # Held apart from the products, which would have the last two axes change places as well: a
    # copy several times as slow.
    query, key, value = jax.lax.optimization_barrier(
        tuple(a.swapaxes(1, 2) for a in (query * query.shape[-1] ** -0.5, key, value))
    )
    scores = jax.lax.dot_general(
        key, query, (((3,), (3,)), batch), preferred_element_type=jnp.float32
    )
    if extra_scores is not None:
        scores = scores + (extra_scores * (query.shape[-1] ** -0.5)).swapaxes(2, 3)
    if mask is not None:
        scores = scores + jnp.where(mask, 0.0, MASKED).swapaxes(2, 3)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(2, keepdims=True)))
    share = 1 / weights.sum(2)[..., None]
    if mask is not None:
        share = jnp.where(mask.any(-1)[..., None], share, 0.0)
    h = jax.lax.dot_general(
        weights.astype(value.dtype),
        value,
        (((2,), (2,)), batch),
        preferred_element_type=jnp.float32,
    )
    return (h * share).astype(value.dtype).swapaxes(1, 2)


def _cudnn_takes(query: Array, key: Array, value: Array) -> bool:
    """Whether cuDNN takes arrays of these shapes and types, forward and backward, with any
    mask; an added score it would round to bfloat16.
    """
    even = query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    halves = all(a.dtype in (jnp.bfloat16, jnp.float16) for a in (query, key, value))
    width = query.shape[-1]
    return halves and even and width % 8 == 0 and width <= CUDNN_WIDTH


def _cudnn_attention(
    query: Array, key: Array, value: Array, mask: Array | None, extra_scores: Array | None
) -> Array:
    """Attention by cuDNN's kernel, without the scores in memory."""
    assert extra_scores is None
    h = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
    if mask is None:
        return h
    # [B, H, L, S] -> [B, L, H, 1]: the kernel gives a query that sees nothing the mean of all
    # values.
    return jnp.where(mask.any(-1, keepdims=True).swapaxes(1, 2), h, jnp.zeros((), h.dtype))
