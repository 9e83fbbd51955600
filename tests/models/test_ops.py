import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flamingo_jax.models import ops

VALUES = np.random.default_rng(0).normal(size=(4, 3, 700)).astype(np.float32)
VALUES[1] = np.round(VALUES[1])
VALUES[2, 0, :-2], VALUES[2, 1] = -np.inf, 0.0


def _some(x: jax.Array) -> tuple[jax.Array, ...]:
    values, places = ops.top_k(x, 5)
    # Parts of the results, as beam search takes them: these make XLA sort everything.
    return values, places, places[..., :2] // 7, places % 7


def test_the_largest_are_found_in_order_and_of_equal_ones_the_first() -> None:
    values, places, *_ = jax.jit(_some)(VALUES)
    expected = np.argsort(-VALUES, axis=-1, kind="stable")[..., :5]
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(VALUES, expected, axis=-1))
    largest = jax.jit(ops.argmax)(VALUES)
    assert largest.dtype == jnp.int32
    np.testing.assert_array_equal(largest, VALUES.argmax(-1))


def test_nothing_is_sorted_for_the_largest_few() -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("GPUs and TPUs have other programs")
    text = jax.jit(_some).lower(VALUES).compile().as_text()
    assert " sort(" not in text and "TopK" in text
