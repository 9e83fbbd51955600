"""Operations that are written differently for CPU, GPU and TPU: the only model file that
checks the platform.

Each function computes the same values on every backend, in the form that its compiler makes
fast. The comments give the measured reasons.
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
"""The score of a masked key: finite, so that the softmax of a fully masked row is not NaN."""

CUDNN_WIDTH = 128
"""The largest head width that cuDNN's bfloat16 attention supports on every GPU."""


def matmul(x: Array, w: Array, contract: int = 1) -> Array:
    """Contracts the last `contract` axes of `x` with the first of `w`, in the dtype of `x`.

    x: [..., inputs], w: [inputs, outputs], where inputs and outputs may be several axes ->
    [..., outputs].
    """
    if platform() != "cpu":
        # No reshape to two axes: TPUs tile the last two axes, and merging axes whose length is
        # no multiple of 8 (164 keys of an image, for example) would copy the array.
        return jnp.tensordot(x, w.astype(x.dtype), contract)
    # [rows, inner] @ [inner, outputs]: XLA's CPU backend takes twice as long for the gradient
    # of a product with several row axes.
    inner = math.prod(w.shape[:contract])
    product = x.reshape(-1, inner) @ w.astype(x.dtype).reshape(inner, -1)
    return product.reshape(*x.shape[: x.ndim - contract], *w.shape[contract:])


def conv_operand(x: Array, result: DTypeLike) -> Array:
    """Casts an operand of a convolution to the dtype of its result on GPUs, where cuDNN cannot
    accumulate into a wider dtype than its inputs'; elsewhere returns `x` as it is.
    """
    return x.astype(result) if platform() == "gpu" else x


def drop_unit_axes(x: Array) -> Array:
    """Drops the axes of length 1 on CPUs, except the last: reductions over axes that follow
    one take ten times as long there. Elsewhere returns `x` as it is.

    Longer leading axes are not merged: merging two axes that are sharded over the mesh would
    need an all-gather.
    """
    ones = [axis for axis, size in enumerate(x.shape[:-1]) if size == 1]
    return jnp.squeeze(x, ones) if platform() == "cpu" else x


def scan_unroll(count: int) -> int:
    """Returns the `unroll` of a `lax.scan` over `count` layers: 1, or on CPUs all of 4 to 8.

    On CPUs the loop costs a third of small layers' time, since residuals for the backward pass
    are written to stacked buffers and read back by one thread. Below 4 layers unrolling saves
    less time than the longer compilation takes.
    """
    return count if platform() == "cpu" and 4 <= count <= 8 else 1


def top_k(x: Array, count: int) -> tuple[Array, Array]:
    """Finds the `count` largest values along the last axis, and their indices, int32: the largest
    first, of equal ones the earlier first.
    """
    values, places = jax.lax.top_k(x, count)
    if platform() != "cpu":
        return values, places
    # XLA's CPU backend makes a full sort of it, 100 times as slow for a vocabulary, where what
    # follows takes a part of the results: barriers keep that apart. Each has its own: the
    # partitioner of a mesh fails on one for both.
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(places)


def argmax(x: Array) -> Array:
    """Finds the index of the largest value along the last axis, int32; the first of equal ones."""
    # On CPUs XLA's own takes five times as long: its reduction of pairs is not vectorised.
    found = top_k(x, 1)[1][..., 0] if platform() == "cpu" else jnp.argmax(x, axis=-1)
    return found.astype(jnp.int32)


def attention_kernel(
    query: Array, key: Array, value: Array, extra_scores: Array | None
) -> AttentionKernel | None:
    """Chooses the backend's fast implementation of `attention.attend` for arrays of these
    shapes and dtypes. It takes the same arguments; None where the reference is as fast.
    """
    if platform() == "cpu":
        return _keys_first_attention
    if platform() == "gpu" and extra_scores is None and _cudnn_takes(query, key, value):
        return _cudnn_attention
    return None


def repeat_heads(x: Array, query: Array) -> Array:
    """Repeats keys or values [B, S, K, d] for the H / K query heads that share each of them
    (grouped-query attention) -> [B, S, H, d].
    """
    shared = query.shape[2] // x.shape[2]
    return jnp.repeat(x, shared, axis=2) if shared > 1 else x


def _keys_first_attention(
    query: Array, key: Array, value: Array, mask: Array | None, extra_scores: Array | None
) -> Array:
    """Computes attention in the order that XLA's CPU backend runs fast: scores have keys
    before queries, [B, H, S, L], and the softmax's division is applied to the output
    [B, H, L, d] rather than to the scores.
    """
    key, value = repeat_heads(key, query), repeat_heads(value, query)
    batch = ((0, 1), (0, 1))
    # [B, L, H, d] -> [B, H, L, d]. The barrier keeps XLA from fusing this transpose into the
    # products, which would transpose the last two axes too: a copy several times as slow.
    query, key, value = jax.lax.optimization_barrier(
        tuple(a.swapaxes(1, 2) for a in (query * query.shape[-1] ** -0.5, key, value))
    )
    # [B, H, S, d] x [B, H, L, d] -> [B, H, S, L]
    scores = jax.lax.dot_general(
        key, query, (((3,), (3,)), batch), preferred_element_type=jnp.float32
    )
    if extra_scores is not None:
        scores = scores + (extra_scores * (query.shape[-1] ** -0.5)).swapaxes(2, 3)
    if mask is not None:
        scores = scores + jnp.where(mask, 0.0, MASKED).swapaxes(2, 3)
    # The maximum is subtracted against overflow alone: it cancels, so it needs no gradient.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(2, keepdims=True)))
    share = 1 / weights.sum(2)[..., None]
    if mask is not None:
        # A query whose every key is masked gets exactly zero.
        share = jnp.where(mask.any(-1)[..., None], share, 0.0)
    # [B, H, S, L] x [B, H, S, d] -> [B, H, L, d]
    h = jax.lax.dot_general(
        weights.astype(value.dtype),
        value,
        (((2,), (2,)), batch),
        preferred_element_type=jnp.float32,
    )
    return (h * share).astype(value.dtype).swapaxes(1, 2)


def _cudnn_takes(query: Array, key: Array, value: Array) -> bool:
    """Returns whether cuDNN supports these shapes and dtypes, forward and backward, with any
    mask. Extra scores are excluded by the caller: cuDNN would round them to bfloat16.
    """
    even = query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    halves = all(a.dtype in (jnp.bfloat16, jnp.float16) for a in (query, key, value))
    width = query.shape[-1]
    return halves and even and width % 8 == 0 and width <= CUDNN_WIDTH


def _cudnn_attention(
    query: Array, key: Array, value: Array, mask: Array | None, extra_scores: Array | None
) -> Array:
    """Computes attention with cuDNN's flash kernel, which never materialises the scores."""
    assert extra_scores is None
    h = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
    if mask is None:
        return h
    # The mask [B, H, L, S] -> [B, L, H, 1]. The kernel gives a query whose every key is masked
    # the mean of all values; it must get zero.
    return jnp.where(mask.any(-1, keepdims=True).swapaxes(1, 2), h, jnp.zeros((), h.dtype))
