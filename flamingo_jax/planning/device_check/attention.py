"""Checks the backend's fast attention against attention in float32, in value and gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flamingo_jax.models import ops
from flamingo_jax.models.attention import attend, causal_mask
from flamingo_jax.planning.device_check.sections import Budget, CheckFailed, Results
from flamingo_jax.planning.device_check.sizes import AttentionCase, DeviceCheckSize
from flamingo_jax.planning.timing import median_seconds

Array = jax.Array
WORSE = 3.0
"""How many times the rounding error of the plain form the fast one may have."""


def check_attention(size: DeviceCheckSize, results: Results, budget: Budget) -> None:
    """Compares every case with float32, and its error with that of the plain form in the same
    dtype, which rounds at the same places.

    Raises: CheckFailed for a larger error, or where a query that sees nothing does not get zero.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    results.put("device", jax.devices()[0].device_kind)
    wrong = []
    for case in size.attention:
        if budget.left < 0:
            results.put(case.name, "no time was left")
            continue
        found = _compare(case, dtype, size.steps)
        results.put(case.name, found)
        if not found["agrees"]:
            wrong.append(case.name)
    if wrong:
        raise CheckFailed(f"fast attention differs from float32 in {', '.join(wrong)}")


def _compare(case: AttentionCase, dtype: DTypeLike, steps: int) -> dict[str, Any]:
    query, key, value, weights = _arrays(case, dtype)
    mask = _mask(case)
    wide = tuple(a.astype(jnp.float32) for a in (query, key, value))

    def results_of(attention: Any) -> Any:
        def total(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
            h = attention(query, key, value, mask)
            return (h.astype(jnp.float32) * weights).sum(), h

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))

    with jax.default_matmul_precision("highest"):
        grads, h = results_of(_plain)(*wide)
        exact = jax.device_get((h, *grads))
    runs = {"fast": results_of(attend), "plain": results_of(_plain)}
    errors, seconds, seen = {}, {}, None
    for name, run in runs.items():
        grads, h = run(query, key, value)
        made = jax.device_get((h, *grads))
        seen = made[0] if name == "fast" else seen
        errors[name] = [_error(a, b) for a, b in zip(made, exact, strict=True)]
        seconds[name] = median_seconds(functools.partial(run, query, key, value), steps)
    # Rounding of the results alone, or another order of sums in float32, is no difference.
    least = 1e-5 if dtype == jnp.float32 else 4 * float(jnp.finfo(dtype).eps)
    limits = [max(WORSE * error, least) for error in errors["plain"]]
    sees = np.asarray(mask.any(-1)).swapaxes(1, 2)[..., None]
    zero = bool((np.asarray(seen, np.float32) * ~sees == 0).all())
    kernel = ops.attention_kernel(query, key, value, None)
    return {
        "kernel": kernel.__name__.strip("_") if kernel else "reference",
        "dtype": str(jnp.dtype(dtype)),
        "errors": dict(
            zip(("value", "query", "key", "value_gradient"), errors["fast"], strict=True)
        ),
        "limits": limits,
        "zero_where_nothing_is_seen": zero,
        "seconds": seconds,
        "agrees": zero and all(e <= m for e, m in zip(errors["fast"], limits, strict=True)),
    }


def _error(found: Any, exact: Any) -> float:
    """Returns the largest difference, relative to the largest exact value; infinity for NaN."""
    found, exact = np.asarray(found, np.float32), np.asarray(exact, np.float32)
    error = float(np.abs(found - exact).max() / max(float(np.abs(exact).max()), 1e-30))
    return error if np.isfinite(error) else float("inf")


def _plain(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """Computes attention as it is written, without care for memory: the check's own form."""
    key, value = ops.repeat_heads(key, query), ops.repeat_heads(value, query)
    scores = jnp.einsum("blhd,bshd->bhls", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * query.shape[-1] ** -0.5, ops.MASKED)
    weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0)
    return jnp.einsum("bhls,bshd->blhd", weights.astype(value.dtype), value)


def _arrays(case: AttentionCase, dtype: DTypeLike) -> list[Array]:
    shapes = [
        (case.rows, case.length, case.heads, case.width),
        *[(case.rows, case.keys, case.kv_heads, case.width)] * 2,
        (case.rows, case.length, case.heads, case.width),
    ]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    made = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    return [a.astype(dtype) for a in made[:3]] + made[3:]


def _mask(case: AttentionCase) -> Array:
    """Makes the mask bool [B, 1, L, S] of a case; see `AttentionCase`."""
    places = np.arange(case.length)
    if case.mask == "packed":
        segments = 1 + (places > case.length // 3).astype(np.int32)
        segments[-case.length // 8 :] = 0
        return causal_mask(jnp.asarray(np.tile(segments, (case.rows, 1))))
    if case.mask == "cache":
        filled = case.keys - case.length - np.arange(case.rows)[:, None] % 7
        seen = np.arange(case.keys) <= (filled + places)[..., None]
        return jnp.asarray(seen[:, None])
    # The first queries see no visual, the others one after the other.
    visuals = case.keys // case.block
    index = places * (visuals + 1) // case.length - 1
    seen = index[:, None] == np.arange(case.keys) // case.block
    return jnp.asarray(np.broadcast_to(seen, (case.rows, 1, *seen.shape)))
