import numpy as np
import pytest

from flamingo_jax.evaluation.shots import RandomShots, draw, make_shot_selector
from tests.evaluation.world import ScriptedEngine, example

SUPPORT = [example(n) for n in range(40)]


def ids(examples: list) -> list[str]:  # type: ignore[type-arg]
    return [e.id for e in examples]


def test_random_shots_depend_on_seed_and_query_alone() -> None:
    query = example(100)
    first = RandomShots(SUPPORT, 1)(query, 8)
    assert ids(first) == ids(RandomShots(SUPPORT, 1)(query, 8))
    assert ids(first) != ids(RandomShots(SUPPORT, 2)(query, 8))
    assert ids(first) != ids(RandomShots(SUPPORT, 1)(example(101), 8))
    assert len(set(ids(first))) == 8


def test_a_query_is_never_its_own_example() -> None:
    for query in SUPPORT:
        shown = RandomShots(SUPPORT, 0)(query, 39)
        assert query.id not in ids(shown)
        assert len(shown) == 39


def test_random_shots_use_the_whole_support() -> None:
    drawn = np.array(
        [int(RandomShots(SUPPORT, 0)(example(1000 + n), 1)[0].id[1:]) for n in range(2000)]
    )
    assert np.bincount(drawn, minlength=40).min() > 20


def test_rices_takes_the_nearest_with_the_most_similar_last() -> None:
    choose = make_shot_selector("rices", SUPPORT, [SUPPORT[20], example(41)], 0, ScriptedEngine())
    assert ids(choose(example(41), 3)) == ["e37", "e38", "e39"]
    assert set(ids(choose(SUPPORT[20], 2))) == {"e19", "e21"}


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
        make_shot_selector("nearest", SUPPORT, [], 0, ScriptedEngine())
