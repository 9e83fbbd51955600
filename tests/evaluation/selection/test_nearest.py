"""The exact search against brute force in float64."""

import itertools
import math
import re

import numpy as np
import pytest

from flamingo_jax.evaluation.selection import nearest
from flamingo_jax.evaluation.selection.nearest import merge, search


def brute_force(queries: np.ndarray, embeddings: np.ndarray, count: int) -> np.ndarray:
    """Sorts every inner product, each summed without rounding."""
    found = []
    for query in queries.astype(np.float64):
        products = [math.fsum(query * row) for row in embeddings.astype(np.float64)]
        found.append(sorted(range(len(products)), key=lambda n: (-products[n], n))[:count])
    return np.array(found)


def unit(rng: np.random.Generator, rows: int, width: int, dtype: str) -> np.ndarray:
    values = rng.standard_normal((rows, width)).astype(np.float32)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("cuts", [[], [1, 2, 40], [300]])
def test_the_search_is_brute_force(dtype: str, cuts: list[int]) -> None:
    rng = np.random.default_rng(0)
    support, queries = unit(rng, 400, 48, dtype), unit(rng, 7, 48, "float32")
    found = search(queries, np.split(support, cuts), 33)
    assert (found.rows == brute_force(queries, support, 33)).all()
    assert (np.diff(found.similarities) <= 0).all()
    exact = [math.fsum(queries[0].astype(float) * support[row]) for row in found.rows[0]]
    np.testing.assert_allclose(found.similarities[0], exact, rtol=0, atol=1e-15)


def test_small_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    support, queries = unit(rng, 300, 16, "float32"), unit(rng, 9, 16, "float32")
    whole = search(queries, [support], 8)
    monkeypatch.setattr(nearest, "BLOCK_BYTES", 4 * 16 * 7)
    monkeypatch.setattr(nearest, "QUERIES_AT_A_TIME", 4)
    pieces = search(queries, [support], 8)
    assert (whole.rows == pieces.rows).all() and (whole.similarities == pieces.similarities).all()


def test_equal_embeddings_are_in_the_order_of_their_numbers() -> None:
    rng = np.random.default_rng(2)
    few, query = unit(rng, 5, 24, "float32"), unit(rng, 3, 24, "float32")
    support = np.tile(few, (60, 1))  # Number n is a copy of n % 5.
    for cuts in ([], [13, 14, 170]):
        found = search(query, np.split(support, cuts), 64).rows
        assert (found == brute_force(query, support, 64)).all()
        # The nearest of the five comes 60 times, in order, before the second.
        assert (np.diff(found[:, :60]) == 5).all()
    assert (search(query, [np.zeros((9, 24), np.float16)], 4).rows == [0, 1, 2, 3]).all()


def test_what_float32_cannot_tell_apart_is_decided_in_float64() -> None:
    """Similarities that differ by less than float32's rounding are in their true order."""
    rng = np.random.default_rng(3)
    query = unit(rng, 1, 512, "float32")
    support = np.repeat(query, 200, axis=0)
    # One last place of one component, up or down.
    for row, place in enumerate(rng.integers(512, size=200)):
        toward = np.float32(np.inf if row % 2 else -np.inf)
        support[row, place] = np.nextafter(support[row, place], toward)
    found = search(query, np.array_split(support, 7), 20)
    assert (found.rows == brute_force(query, support, 20)).all()
    in_float32 = np.argsort(-(support @ query[0]), kind="stable")[:20]
    assert (found.rows != in_float32).any()


@pytest.mark.parametrize("edges", [[0, 300], [0, 7, 300], [0, 0, 5, 130, 131, 300]])
def test_parts_that_are_searched_apart_are_merged_to_one_search(edges: list[int]) -> None:
    rng = np.random.default_rng(5)
    # Each embedding is there three times, mostly in different parts.
    support = np.tile(unit(rng, 100, 24, "float32"), (3, 1))
    queries = unit(rng, 6, 24, "float32")
    parts = [
        search(queries, [support[first:stop]], 20, first=first)
        for first, stop in itertools.pairwise(edges)
    ]
    merged, whole = merge(parts, 20), search(queries, [support], 20)
    assert (merged.rows == brute_force(queries, support, 20)).all()
    assert (merged.similarities == whole.similarities).all()
    assert merge(parts, 400).rows.shape[1] == min(300, sum(part.rows.shape[1] for part in parts))


def test_few_or_no_embeddings() -> None:
    rng = np.random.default_rng(4)
    support, queries = unit(rng, 3, 8, "float32"), unit(rng, 2, 8, "float32")
    assert search(queries, [support], 32).rows.shape == (2, 3)
    assert search(queries, [], 32).rows.shape == (2, 0)
    assert search(queries[:0], [support], 32).rows.shape == (0, 3)
    assert search(queries, [support], 0).rows.shape == (2, 0)
    with pytest.raises(ValueError, match=re.escape("(9,)")):
        search(queries, [np.zeros((1, 9), np.float32)], 1)
