"""Published figures against what the papers say of them in words and in other tables."""

import numpy as np
import pytest

from flamingo_jax.evaluation.results.published import PUBLISHED, published_scores


def test_figures_are_those_that_the_papers_quote() -> None:
    # Flamingo: the abstract's 32 shots of COCO and the text's VisDial limit; OpenFlamingo: its
    # table 9, which has random and RICES shots side by side.
    assert published_scores("coco")["Flamingo-80B"][32] == 113.8
    assert 32 not in published_scores("visdial")["Flamingo-80B"]
    assert published_scores("RareAct")["Flamingo-3B"] == {0: 58.4}
    table_9 = {"coco": (89.0, 93.1), "textvqa": (28.2, 34.2), "hateful_memes": (54.0, 70.1)}
    for name, (random, rices) in table_9.items():
        scores = published_scores(name)
        assert scores["OpenFlamingo-9B"][4] == random
        assert scores["OpenFlamingo-9B, RICES"][4] == rices


@pytest.mark.parametrize(
    ("size", "benchmark", "fractions"),
    [
        ("3B", "coco", (1.03, 0.91, 0.95, 0.94, 0.94)),
        ("4B", "coco", (1.05, 0.96, 1.00, 0.98, 0.96)),
        ("9B", "coco", (1.00, 0.96, 0.97, 0.97, 0.94)),
        ("9B", "okvqa", (0.85, 0.81, 0.82, 0.84, 0.83)),
        ("9B", "vizwiz", (0.95, 0.98, 0.98, 0.99, 1.00)),
        ("4B", "textvqa", (0.70, 0.79, 0.66, 0.57, 0.46)),
        ("3B", "vqav2", (0.91, 0.86, 0.83, 0.82, 0.82)),
    ],
)
def test_open_flamingos_fractions_of_flamingo_are_those_of_its_figure_11(
    size: str, benchmark: str, fractions: tuple[float, ...]
) -> None:
    scores = published_scores(benchmark)
    whole = scores["Flamingo-9B" if size == "9B" else "Flamingo-3B"]
    part = scores[f"OpenFlamingo-{size}"]
    found = [part[n] / whole[n] for n in (0, 4, 8, 16, 32)]
    np.testing.assert_allclose(found, fractions, atol=0.0051)


def test_names_of_benchmarks_may_be_written_in_several_ways() -> None:
    assert published_scores("hatefulmemes") == published_scores("hateful_memes") != {}
    assert published_scores("MSVD-QA")["Flamingo-9B"][32] == 47.2
    assert published_scores("made_up") == {}


def test_every_model_has_a_source_and_plausible_scores() -> None:
    for model in PUBLISHED.values():
        assert model.source and model.selection in ("random", "rices")
        scores = [s for shots in model.scores.values() for s in shots.values()]
        assert scores and all(5 < score < 120 for score in scores)


def test_models_are_chosen_by_how_their_shots_were() -> None:
    assert all("RICES" not in name for name in published_scores("coco", "random"))
    assert list(published_scores("coco", "rices")) == [
        f"OpenFlamingo-{size}, RICES" for size in ("3B", "4B", "9B")
    ]
