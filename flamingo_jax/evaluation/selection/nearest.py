"""Finds the most similar of many embeddings exactly, a block of them at a time.

Similarities of a block are computed in float32, by one matrix product. Its rounding error is
bounded, so that whatever could be among the nearest is known; only that is computed again in
float64, and decides.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

BLOCK_BYTES = 64 << 20
"""The most bytes of a block's similarities in float32, and of the pairs that are computed in
float64 at a time.
"""
QUERIES_AT_A_TIME = 1024


class Nearest(NamedTuple):
    """The nearest embeddings of each query, the most similar first.

    rows: int64 [Q, K], their numbers. similarities: float64 [Q, K].
    """

    rows: np.ndarray
    similarities: np.ndarray


def search(
    queries: np.ndarray, blocks: Iterable[np.ndarray], count: int, *, first: int = 0
) -> Nearest:
    """Finds the `count` embeddings with the largest inner product with each query: with the
    cosine similarity, where all have length 1.

    The result is that of sorting all inner products in float64; equal ones are in the order of
    their numbers. Memory is bounded by `BLOCK_BYTES` and the size of a block, whatever the
    number of embeddings.

    Args:
      queries: float16 or float32 [Q, C].
      blocks: the embeddings [S, C] in order, each block [n, C] of any length, float16 or
        float32.
      count: K; where there are fewer embeddings, all are returned.
      first: the number of the first embedding, where others are searched elsewhere (`merge`).

    Raises: ValueError where a block has another width than the queries.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    parts = [
        _Search(queries[start : start + QUERIES_AT_A_TIME], count)
        for start in range(0, len(queries), QUERIES_AT_A_TIME)
    ]
    beyond = first
    for block in blocks:
        if block.shape[1:] != queries.shape[1:]:
            raise ValueError(
                f"embeddings have the shape {block.shape[1:]}, but queries {queries.shape[1:]}"
            )
        for piece in _pieces(block, max((len(part.queries) for part in parts), default=1)):
            for part in parts:
                part.add(beyond, piece)
            beyond += len(piece)
    width = min(count, beyond - first)
    return Nearest(
        np.concatenate([part.rows[:, :width] for part in parts] or [np.zeros((0, width), int)]),
        np.concatenate([part.similarities[:, :width] for part in parts] or [np.zeros((0, width))]),
    )


def merge(parts: Sequence[Nearest], count: int) -> Nearest:
    """Merges the nearest [Q, K_i] of several parts of the embeddings, which are searched each
    with its own `first`, by one process or by several: to the same result as one search for
    `count` of all, where each part was searched for as many.
    """
    rows = np.concatenate([part.rows for part in parts], axis=1)
    similarities = np.concatenate([part.similarities for part in parts], axis=1)
    order = np.lexsort((rows, -similarities))[:, :count]
    return Nearest(
        np.take_along_axis(rows, order, axis=1), np.take_along_axis(similarities, order, axis=1)
    )


def _pieces(block: np.ndarray, queries: int) -> Iterator[np.ndarray]:
    """Cuts a block to float32 pieces whose similarities have at most `BLOCK_BYTES`."""
    rows = max(1, BLOCK_BYTES // (4 * max(queries, block.shape[1])))
    for start in range(0, len(block), rows):
        yield np.ascontiguousarray(block[start : start + rows], np.float32)


class _Search:
    """The nearest so far of some queries; rows of -1 with similarity -inf are still to find."""

    def __init__(self, queries: np.ndarray, count: int):
        self.queries = queries
        self._lengths = np.sqrt(np.square(queries, dtype=np.float64).sum(axis=1))
        self.rows = np.full((len(queries), count), -1, np.int64)
        self.similarities = np.full((len(queries), count), -np.inf)

    def add(self, first: int, block: np.ndarray) -> None:
        """Takes in the embeddings [n, C] numbered from `first`, after all earlier ones."""
        count = self.rows.shape[1]
        if not count or not len(block):
            return
        approximate = self.queries @ block.T  # [Q, n]
        # A sum of C products, in whatever order, is wrong by less than C units of rounding of
        # the sum of magnitudes, which is at most the product of lengths; twice that is taken.
        longest = np.sqrt(np.einsum("nc,nc->n", block, block).max(initial=0.0))
        margin = 2 * (block.shape[1] + 1) * 2.0**-24 * self._lengths * longest
        least = self.similarities[:, -1] - margin
        if len(block) >= count and np.isneginf(least).any():
            kth = np.partition(approximate, len(block) - count, axis=1)[:, len(block) - count]
            least = np.maximum(least, kth - 2 * margin)
        # Rounded down, since the comparison is in float32.
        least = np.nextafter(least.astype(np.float32), np.float32(-np.inf))
        near = np.flatnonzero(approximate >= least[:, None])
        del approximate
        found, places = np.divmod(near, len(block))
        exact = self._exactly(found, places, block)
        edges = np.searchsorted(found, np.arange(len(self.queries) + 1))
        for query in np.flatnonzero(np.diff(edges)).tolist():
            own = slice(edges[query], edges[query + 1])
            self._merge(query, first + places[own], exact[own])

    def _exactly(self, found: np.ndarray, places: np.ndarray, block: np.ndarray) -> np.ndarray:
        """Computes the inner products of pairs in float64, equal ones for equal embeddings."""
        exact = np.empty(len(found))
        step = max(1, BLOCK_BYTES // (16 * block.shape[1]))
        for start in range(0, len(found), step):
            part = slice(start, start + step)
            pairs = self.queries[found[part]].astype(np.float64)
            pairs *= block[places[part]]
            # By rows: a BLAS product may round a row differently at another place.
            exact[part] = pairs.sum(axis=1)
        return exact

    def _merge(self, query: int, rows: np.ndarray, similarities: np.ndarray) -> None:
        count = self.rows.shape[1]
        rows = np.concatenate([self.rows[query], rows])
        similarities = np.concatenate([self.similarities[query], similarities])
        # -1 is only where the similarity is -inf, and so is last.
        order = np.lexsort((rows, -similarities))[:count]
        self.rows[query], self.similarities[query] = rows[order], similarities[order]
