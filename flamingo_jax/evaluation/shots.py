"""Which support examples stand before a query: at random, or by similarity (RICES).

Deterministic in seed and query.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.processing.visuals import Visual


class ShotSelector(Protocol):
    """Chooses the support examples of a query, in the order of the prompt."""

    def __call__(self, query: BenchmarkExample, count: int) -> list[BenchmarkExample]: ...


class RandomShots:
    """Chooses different examples at random, keyed by (seed, query id): what one query gets does
    not depend on the others.
    """

    def __init__(self, support: Sequence[BenchmarkExample], seed: int):
        self.support, self._seed = support, seed

    def __call__(self, query: BenchmarkExample, count: int) -> list[BenchmarkExample]:
        chosen = keyed_rng(self._seed, query.id).permutation(len(self.support))
        return _others(query, (self.support[place] for place in chosen), count)


class RicesShots:
    """Chooses the support nearest to the query by frozen encoder features, the most similar
    last (RICES; Yang et al. 2022, paper A.2).

    The paper names neither pooling nor metric: features averaged over cells and frames, cosine
    similarity. Ties fall to the earlier.
    """

    def __init__(
        self,
        support: Sequence[BenchmarkExample],
        support_features: np.ndarray,
        query_features: dict[str, np.ndarray],
    ):
        """support_features: float [S, C]; query_features: {query id: [C]}; rows of length 1."""
        self.support, self._features, self._queries = support, support_features, query_features

    def __call__(self, query: BenchmarkExample, count: int) -> list[BenchmarkExample]:
        similarity = self._features @ self._queries[query.id]
        nearest = np.argsort(-similarity, kind="stable")
        return _others(query, (self.support[place] for place in nearest), count)[::-1]


def _others(
    query: BenchmarkExample, support: Iterable[BenchmarkExample], count: int
) -> list[BenchmarkExample]:
    """Takes the first `count` that are not the query itself."""
    return list(itertools.islice((one for one in support if one.id != query.id), count))


def draw(seed: int, name: str, size: int, count: int) -> list[int]:
    """Draws `count` of the places 0..size - 1 at random, in order; all of them where there are
    no more, or for a count of 0. The first of a data set would be a sample of nothing: many are
    sorted.
    """
    if not count or count >= size:
        return list(range(size))
    return sorted(keyed_rng(seed, name).choice(size, count, replace=False).tolist())


class HasFeatures(Protocol):
    """An engine, as far as RICES asks it."""

    def features(self, visuals: Sequence[Visual]) -> np.ndarray:
        """Encodes visuals: float32 [M, C], of length 1."""


def make_shot_selector(
    selection: str,
    support: Sequence[BenchmarkExample],
    queries: Sequence[BenchmarkExample],
    seed: int,
    engine: HasFeatures,
) -> ShotSelector:
    """Makes the selector of a name, "random" or "rices"; raises ValueError for another."""
    if selection not in ("random", "rices"):
        raise ValueError(f"selection is {selection!r}, but must be 'random' or 'rices'")
    if selection == "rices" and support:
        features = engine.features([example.visual for example in [*support, *queries]])
        return RicesShots(
            support,
            features[: len(support)],
            {q.id: f for q, f in zip(queries, features[len(support) :], strict=True)},
        )
    return RandomShots(support, seed)


def keyed_rng(seed: int, name: str) -> np.random.Generator:
    """Makes a generator that is the same wherever and in whatever order names are visited."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest)))
