import json
import pathlib
from collections.abc import Sequence

import numpy as np
import pytest

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.media import MediaPool, Preprocessing
from flamingo_jax.evaluation.selection.shots import ChosenShots, MediaEncoder, choose_shots, draw
from flamingo_jax.processing.visuals import Visual
from tests.evaluation.world import ScriptedEngine, example
from tests.inference.tiny_models import tiny_config

SUPPORT = [example(n) for n in range(40)]
SELECTIONS = ["random", "random_per_query", "rices"]


def encoder(engine: ScriptedEngine | None = None) -> MediaEncoder:
    return MediaEncoder(engine or ScriptedEngine(), MediaPool(Preprocessing.of(tiny_config(40))))


def ids(examples: list[BenchmarkExample]) -> list[str]:
    return [e.id for e in examples]


def random_shots(
    queries: list[BenchmarkExample], seed: int = 0, selection: str = "random_per_query"
) -> ChosenShots:
    return choose_shots(selection, SUPPORT, queries, encoder(), seed=seed)


def test_random_shots_per_query_depend_on_seed_and_query_alone() -> None:
    first = ids(random_shots([example(100), example(101)], 1).of(0, 8))
    assert first == ids(random_shots([example(101), example(100)], 1).of(1, 8))
    assert first != ids(random_shots([example(100)], 2).of(0, 8))
    assert first != ids(random_shots([example(101)], 1).of(0, 8))
    assert len(set(first)) == 8


def test_random_shots_are_one_draw_for_all_queries() -> None:
    queries = [example(n) for n in range(100, 110)]
    shots = random_shots(queries, selection="random")
    assert len({tuple(ids(shots.of(n, 8))) for n in range(10)}) == 1
    assert ids(shots.of(0, 8)) != ids(random_shots(queries, 1, "random").of(0, 8))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_query_is_never_its_own_example(selection: str) -> None:
    shots = choose_shots(selection, SUPPORT, SUPPORT, encoder(), count=39)
    for number, query in enumerate(SUPPORT):
        shown = ids(shots.of(number, 39))
        assert query.id not in shown and len(set(shown)) == 39


@pytest.mark.parametrize("selection", SELECTIONS)
def test_fewer_shots_are_a_part_of_more(selection: str) -> None:
    queries = [example(100), SUPPORT[3]]
    large = [example(n) for n in range(5000)]  # Drawn one by one, not permuted as a whole.
    for support in (SUPPORT, large):
        shots = choose_shots(selection, support, queries, encoder())
        more = choose_shots(selection, support, queries, encoder(), count=38)
        for query in (0, 1):
            eight, all_ = ids(shots.of(query, 8)), ids(more.of(query, 38))
            assert eight == (all_[-8:] if selection == "rices" else all_[:8])
            assert len(set(all_)) == 38


def test_random_shots_use_the_whole_support() -> None:
    shots = random_shots([example(1000 + n) for n in range(2000)])
    drawn = np.array([int(shots.of(n, 1)[0].id[1:]) for n in range(2000)])
    assert np.bincount(drawn, minlength=40).min() > 20


def test_rices_takes_the_nearest_with_the_most_similar_last() -> None:
    shots = choose_shots("rices", SUPPORT, [SUPPORT[20], example(41)], encoder())
    assert ids(shots.of(1, 3)) == ["e37", "e38", "e39"]
    assert set(ids(shots.of(0, 2))) == {"e19", "e21"}


class CountingEngine(ScriptedEngine):
    def __init__(self) -> None:
        super().__init__()
        self.encoded = 0

    def features(self, visuals: Sequence[Visual]) -> np.ndarray:
        self.encoded += len(visuals)
        return super().features(visuals)


def test_features_are_computed_once_for_all_numbers_of_shots(tmp_path: pathlib.Path) -> None:
    queries = [example(n) for n in (50, 60)]
    engine = CountingEngine()
    kept = choose_shots("rices", SUPPORT, queries, encoder(engine), count=4, folder=tmp_path)
    assert engine.encoded == 42
    more = choose_shots("rices", SUPPORT, queries, encoder(engine), count=39, folder=tmp_path)
    assert engine.encoded == 42
    in_memory = choose_shots("rices", SUPPORT, queries, encoder(engine), count=39)
    for query in (0, 1):
        assert ids(more.of(query, 39)) == ids(in_memory.of(query, 39))
        assert ids(kept.of(query, 4)) == ids(in_memory.of(query, 4))
    other = CountingEngine()
    other.encoder_digest = "f" * 32
    choose_shots("rices", SUPPORT, queries, encoder(other), folder=tmp_path)
    assert other.encoded == 42


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_repeated_run_has_the_kept_shots(selection: str, tmp_path: pathlib.Path) -> None:
    queries = [example(100), example(101)]

    def choose(support: list[BenchmarkExample]) -> ChosenShots:
        return choose_shots(selection, support, queries, encoder(), name="a/b", folder=tmp_path)

    choose(SUPPORT)
    (file,) = (tmp_path / "shots").iterdir()
    # Other shots in the file show that it is read, rather than drawn again.
    document = json.loads(file.read_text())
    document["orders"] = [order[::-1] for order in document["orders"]]
    file.write_text(json.dumps(document))
    order = [document["ids"][str(place)] for place in document["orders"][0][:4]]
    shown = ids(choose(SUPPORT).of(0, 4))
    assert shown == (order[::-1] if selection == "rices" else order)
    choose(SUPPORT[::-1])
    assert len(list((tmp_path / "shots").iterdir())) == 2
    for broken in ("", "[]", json.dumps(document | {"orders": [[999]]}), json.dumps({"format": 9})):
        file.write_text(broken)
        with pytest.raises(UserError, match="keeps the chosen shots, cannot be used .*: remove it"):
            choose(SUPPORT)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_drawn_comes_from_the_whole_set(seed: int) -> None:
    places = draw(seed, "photos:train", 100_000, 2048)
    assert places == sorted(set(places)) and len(places) == 2048
    assert places == draw(seed, "photos:train", 100_000, 2048)
    assert (
        places
        != draw(seed, "others:train", 100_000, 2048)
        != draw(seed + 1, "others:train", 100_000, 2048)
    )
    # Of each tenth of the set about a tenth: 205 with a deviation of 13.6.
    assert np.abs(np.bincount(np.array(places) // 10_000) - 204.8).max() < 6 * 13.6
    assert draw(seed, "few", 5, 2048) == draw(seed, "few", 5, 0) == [0, 1, 2, 3, 4]


def test_another_selection_is_refused() -> None:
    with pytest.raises(ValueError, match="nearest"):
        choose_shots("nearest", SUPPORT, [], encoder())
