"""VQA accuracy by each variant's rules against the owners' evaluations."""

import json
import pathlib

import pytest

from flamingo_jax.evaluation.metrics.vqa_accuracy import (
    VARIANTS,
    ivqa_accuracy,
    score_answers,
    vqa_accuracy,
)
from tests.evaluation.score_cases import answers

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "answers.json"


@pytest.mark.parametrize("name", ["official", "textvqa", "lmms_eval", "vizwiz"])
def test_scores_are_the_owners(name: str) -> None:
    expected = json.loads(FIXTURE.read_text())[name]
    found = [score_answers(*case, VARIANTS[name]) for case in answers(300, seed=2)]
    assert found == pytest.approx(expected, abs=1e-12)
    if name == "official":
        assert [vqa_accuracy(*case) for case in answers(300, seed=2)] == found


def test_equal_records_are_left_out_together() -> None:
    """Without answer_id the official scorer leaves out all who gave the same answer."""
    truths = ["yes"] * 4 + ["no"] * 6
    alone = score_answers("yes", truths, VARIANTS["official"])
    twins = score_answers("yes", truths, VARIANTS["official"], ["maybe"] * 10)
    assert (alone, twins) == (1.0, 0.6)


def test_the_plain_variant_counts_all() -> None:
    assert score_answers("Yes", ["Yes"] * 2 + ["yes"] * 8, VARIANTS["plain"]) == pytest.approx(
        2 / 3
    )


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0.0), (1, 0.5), (2, 1.0), (5, 1.0)])
def test_ivqa_needs_two_of_five(agreeing: int, score: float) -> None:
    others = [f"other {place}" for place in range(5 - agreeing)]
    assert ivqa_accuracy(" Mixing Bowl", ["mixing bowl"] * agreeing + others) == score
