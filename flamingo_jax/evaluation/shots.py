"""Chooses the shots of each query from the support set: at random, or by image similarity
(RICES).

The choice is a function of the seed and the query alone.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.processing.visuals import Visual


class ShotSelector(Protocol):
    """Chooses `count` support examples for a query, in their order in the prompt."""

    def __call__(self, query: BenchmarkExample, count: int) -> list[BenchmarkExample]: ...


class RandomShots:
    """Chooses shots at random without replacement, keyed by (seed, query id): a query's shots
    do not depend on which other queries are evaluated.
    """

    def __init__(self, support: Sequence[BenchmarkExample], seed: int):
        self.support, self._seed = support, seed

    def __call__(self, query: BenchmarkExample, count: int) -> list[BenchmarkExample]:
        chosen = keyed_rng(self._seed, query.id).permutation(len(self.support))
        return _others(query, (self.support[place] for place in chosen), count)


class RicesShots:
    """Retrieval-based In-Context Example Selection (RICES; Yang et al. 2022, paper A.2):
    chooses the support examples whose frozen vision features are most similar to the query's.

    The most similar is last, next to the query. The paper names neither pooling nor metric:
    here features are averaged over the spatial grid and frames and compared by cosine
    similarity. Ties go to the earlier support example.
    """

    def __init__(
        self,
        support: Sequence[BenchmarkExample],
        support_features: np.ndarray,
        query_features: dict[str, np.ndarray],
    ):
        """support_features: float [S, C]. query_features: {query id: [C]}. All unit vectors."""
        self.support, self._features, self._queries = support, support_features, query_features

    def __call__(self, query: BenchmarkExample, count: int) -> list[BenchmarkExample]:
        similarity = self._features @ self._queries[query.id]  # [S]
        nearest = np.argsort(-similarity, kind="stable")
        return _others(query, (self.support[place] for place in nearest), count)[::-1]


def _others(
    query: BenchmarkExample, support: Iterable[BenchmarkExample], count: int
) -> list[BenchmarkExample]:
    """Takes the first `count` support examples other than the query itself."""
    return list(itertools.islice((one for one in support if one.id != query.id), count))


def draw(seed: int, name: str, size: int, count: int) -> list[int]:
    """Draws `count` of the indices 0..size - 1 at random, sorted; all where count is 0 or >=
    size.

    Taking the first `count` would be biased: many datasets are sorted, e.g. by class.
    """
    if not count or count >= size:
        return list(range(size))
    return sorted(keyed_rng(seed, name).choice(size, count, replace=False).tolist())


class HasFeatures(Protocol):
    """The part of `inference.engine.Engine` that RICES needs."""

    def features(self, visuals: Sequence[Visual]) -> np.ndarray:
        """Encodes visuals with the frozen vision encoder: float32 [M, C], unit vectors."""


def make_shot_selector(
    selection: str,
    support: Sequence[BenchmarkExample],
    queries: Sequence[BenchmarkExample],
    seed: int,
    engine: HasFeatures,
) -> ShotSelector:
    """Makes the selector "random" or "rices"; raises ValueError for another name."""
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
    """Makes a random generator keyed by (seed, name), independent of the order of calls."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest)))
