"""How far two float32 computations of one value may lie apart: what rounding does follows from
what is summed, not from a number that held on one processor.

A sum of n terms in any order is off by at most n eps times the sum of their magnitudes (Higham
2002, section 4.2), and so is a chain of sums by all their terms together. Other instruction
sets sum in other orders and fuse other multiplications, so that a test must allow that much; it
need not allow more.
"""

from typing import Any

import numpy as np

EPS = float(np.finfo(np.float32).eps)


def tolerance(terms: float, size: float) -> float:
    """The most that rounding explains of a value that `terms` numbers are summed for, one sum
    after the other, whose magnitude is about `size`.
    """
    return EPS * terms * size


def assert_close(
    found: Any, expected: Any, terms: float, *, size: float | None = None, err_msg: str = ""
) -> None:
    """Asserts that arrays are equal but for rounding.

    Args:
      terms: numbers that are summed on the way to one value, over all sums of the chain; a
        gradient has gone through twice as many.
      size: magnitude of what is summed; by default the largest of `expected`. Values that
        cancel to something small keep the rounding of what they were.
    """
    wanted = np.asarray(expected, np.float64)
    largest = float(np.abs(wanted).max(initial=0.0)) if size is None else size
    np.testing.assert_allclose(
        np.asarray(found, np.float64),
        wanted,
        rtol=0,
        atol=tolerance(terms, largest),
        err_msg=err_msg,
    )
