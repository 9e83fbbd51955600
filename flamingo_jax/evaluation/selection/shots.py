"""Chooses the shots of each query from the support set: at random, or by image similarity
(RICES).

The choice is a function of the seed, the support set and the query alone, and can be kept in a
file beside the results. Fewer shots are always the beginning of more: one choice serves every
number of shots.
"""

import hashlib
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.media import MediaPool, MediaRef
from flamingo_jax.evaluation.selection.feature_store import FeatureSet, FeatureStore, set_identity
from flamingo_jax.evaluation.selection.kept_choice import Orders, keep_choice
from flamingo_jax.evaluation.selection.nearest import search
from flamingo_jax.processing.visuals import Visual
from flamingo_jax.progress import Bar

SELECTIONS = ("random", "random_per_query", "rices")
"""random: one draw for all queries. The paper's random shots of classification are 16 in all
for 1,000 classes (v1 table 4: at most 0.02 per class), so that they were drawn once.
random_per_query: a draw for each query, as OpenFlamingo's evaluation does.
rices: Retrieval-based In-Context Example Selection (Yang et al. 2022, paper A.2), by the frozen
vision encoder's features. The paper names neither pooling nor metric: here features are
averaged over the spatial grid and frames and compared by cosine similarity.
"""
MOST_SHOTS = 32
"""As many are chosen for each query, the paper's largest number, or more where more are asked."""
ENCODED_AT_A_TIME = 64
_PERMUTED = 4096
"""Sets of up to this size are permuted as a whole."""


class HasFeatures(Protocol):
    """The part of `inference.engine.Engine` that RICES needs."""

    @property
    def encoder_digest(self) -> str:
        """Identifies the frozen vision encoder by its parameters."""

    def features(self, visuals: Sequence[Visual]) -> np.ndarray:
        """Encodes visuals with the frozen vision encoder: float32 [M, C], unit vectors."""


class MediaEncoder:
    """Computes the features of images and clips by an engine.

    pool: decodes them.
    """

    def __init__(self, engine: HasFeatures, pool: MediaPool):
        self._engine, self._pool = engine, pool

    @property
    def digest(self) -> str:
        """Identifies the encoder."""
        return self._engine.encoder_digest

    def features(self, media: Sequence[MediaRef]) -> np.ndarray:
        """Encodes media, some at a time: float32 [M, C], unit vectors."""
        parts = []
        for first in range(0, len(media), ENCODED_AT_A_TIME):
            part = media[first : first + ENCODED_AT_A_TIME]
            visuals = self._pool.read(part)
            following = media[first + ENCODED_AT_A_TIME : first + 2 * ENCODED_AT_A_TIME]
            self._pool.prefetch(following)
            parts.append(self._engine.features(visuals))
            self._pool.drop_unused(following)
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


class ChosenShots:
    """The shots that were chosen for each query.

    orders: for each query the places of support examples, the first drawn or the most similar
      first; one row for all queries where they share it.
    nearest_last: whether the prompt has them in reverse, so that the most similar is next to
      the query.
    """

    def __init__(
        self,
        support: Sequence[BenchmarkExample],
        queries: Sequence[BenchmarkExample],
        orders: Orders,
        nearest_last: bool,
    ):
        self._support, self._queries = support, queries
        self._orders, self._nearest_last = orders, nearest_last

    def of(self, query: int, count: int) -> list[BenchmarkExample]:
        """Returns `count` shots of the query with this number, in their order in the prompt. A
        query is never its own example, nor is one of its cluster.
        """
        order = self._orders[query if len(self._orders) > 1 else 0]
        asked = group_of(self._queries[query])
        others = [place for place in order if group_of(self._support[place]) != asked][:count]
        return [self._support[place] for place in (others[::-1] if self._nearest_last else others)]


def choose_shots(
    selection: str,
    support: Sequence[BenchmarkExample],
    queries: Sequence[BenchmarkExample],
    encoder: MediaEncoder | None,
    *,
    name: str = "",
    seed: int = 0,
    count: int = MOST_SHOTS,
    folder: pathlib.Path | None = None,
) -> ChosenShots:
    """Chooses at least `count` shots for every query.

    Args:
      selection: one of `SELECTIONS`.
      name: the benchmark's, by which random draws are keyed, together with the seed.
      folder: where the choice and the features are kept, and taken from if they are there:
        shots/<name>.<selection>.<key>.json, features/<encoder>/<set>/. None for nowhere.

    Raises: ValueError for another selection; UserError for damaged files in the folder.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection is {selection!r}, but must be one of {', '.join(SELECTIONS)}")
    # Examples of a query's own cluster are skipped, as many as are in the support set.
    alike = Counter(map(group_of, support))
    own = max((alike[group_of(query)] for query in queries), default=0)
    most = min(max(count, MOST_SHOTS) + own, len(support))
    about: dict[str, int | str]
    if selection == "rices":
        stored_in = folder and folder / "features"
        if encoder is None:
            raise ValueError("rices needs an encoder")
        about = {"encoder": encoder.digest if folder else ""}

        def choose() -> Orders:
            return _nearest(support, queries, encoder, most, stored_in)
    else:
        about = {"seed": seed, "benchmark": name}
        names = [name] if selection == "random" else [query.id for query in queries]

        def choose() -> Orders:
            return [_drawn(seed, each, len(support), most) for each in names]

    orders = _kept(selection, name, about, support, queries, most, folder, choose)
    return ChosenShots(support, queries, orders, nearest_last=selection == "rices")


def _kept(
    selection: str,
    name: str,
    about: dict[str, int | str],
    support: Sequence[BenchmarkExample],
    queries: Sequence[BenchmarkExample],
    most: int,
    folder: pathlib.Path | None,
    choose: Callable[[], Orders],
) -> Orders:
    if folder is None:
        return choose()
    pixels = selection == "rices"
    about = {
        "selection": selection,
        **about,
        "support": _identity(support, pixels),
        "queries": _identity(queries, pixels) if selection != "random" else "",
    }
    ids = [example.id for example in support]
    return keep_choice(folder / "shots", name, about, ids, most, choose)


def _identity(examples: Sequence[BenchmarkExample], pixels: bool) -> str:
    """Identifies examples by their ids, and for RICES by their pixels."""
    return set_identity(
        hashlib.blake2b(example.id.encode(), digest_size=16).digest()
        + (example.media.key.encode() if pixels else b"")
        for example in examples
    )


def _nearest(
    support: Sequence[BenchmarkExample],
    queries: Sequence[BenchmarkExample],
    encoder: MediaEncoder,
    count: int,
    folder: pathlib.Path | None,
) -> Orders:
    if folder is None:
        asked = encoder.features([query.media for query in queries])
        features = encoder.features([example.media for example in support])
        return search(asked, [features] if len(support) else [], count).rows.tolist()
    stores = [_stored(examples, encoder, folder) for examples in (support, queries)]
    return search(stores[1].rows(), stores[0].blocks(), count).rows.tolist()


def _stored(
    examples: Sequence[BenchmarkExample], encoder: MediaEncoder, folder: pathlib.Path
) -> FeatureStore:
    """Opens the stored features of examples, and computes those that are missing."""
    identity = set_identity(example.media.key.encode() for example in examples)
    features = FeatureSet(encoder.digest, identity, len(examples))
    store = FeatureStore(folder / features.encoder / features.dataset, features)
    if not store.complete:
        with Bar("features", len(examples), start=store.index.rows) as bar:
            store.fill(
                lambda first, stop: encoder.features([one.media for one in examples[first:stop]]),
                batch=ENCODED_AT_A_TIME,
                progress=bar.advance,
            )
    return store


def group_of(example: BenchmarkExample) -> str:
    """Returns what no shot may have in common with its query."""
    return example.cluster or example.id


def _drawn(seed: int, name: str, size: int, count: int) -> list[int]:
    """Draws `count` of 0..size - 1 in random order; fewer are the beginning of more."""
    rng = keyed_rng(seed, name)
    if size <= _PERMUTED or 2 * count > size:
        return rng.permutation(size)[:count].tolist()
    drawn: dict[int, None] = {}
    while len(drawn) < count:
        drawn.setdefault(int(rng.integers(size)))
    return list(drawn)


def draw(seed: int, name: str, size: int, count: int) -> list[int]:
    """Draws `count` of the indices 0..size - 1 at random, sorted; all where count is 0 or >=
    size.

    Taking the first `count` would be biased: many datasets are sorted, e.g. by class.
    """
    if not count or count >= size:
        return list(range(size))
    return sorted(keyed_rng(seed, name).choice(size, count, replace=False).tolist())


def keyed_rng(seed: int, name: str) -> np.random.Generator:
    """Makes a random generator keyed by (seed, name), independent of the order of calls."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest)))
