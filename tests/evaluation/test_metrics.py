import pytest

from flamingo_jax.evaluation.metrics.exact_match import exact_match
from flamingo_jax.evaluation.metrics.vqa_accuracy import normalise_vqa, vqa_accuracy


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        (" A red  circle.", 1.0),
        ("a red circle", 1.0),
        ("red circle", 0.0),
        ("a red circle .", 1.0),
        ("a red circle..", 0.0),
        ("", 0.0),
    ],
)
def test_exact_match_forgives_case_whitespace_and_a_full_stop(
    prediction: str, score: float
) -> None:
    assert exact_match(prediction, ["a blue star", "a red circle"]) == score


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    # Leaving out one of n equal answers leaves n - 1: (n * min(1, (n - 1) / 3) + (10 - n) *
    # min(1, n / 3)) / 10.
    [
        (0, 0.0),
        (1, (0 + 9 / 3) / 10),
        (2, (2 / 3 + 8 * 2 / 3) / 10),
        (3, (3 * 2 / 3 + 7) / 10),
        (4, 1.0),
        (9, 1.0),
    ],
)
def test_vqa_accuracy_with_ten_answers(agreeing: int, expected: float) -> None:
    others = [f"other {place}" for place in range(10 - agreeing)]
    assert vqa_accuracy("yes", ["yes"] * agreeing + others) == pytest.approx(expected)


def test_equal_answers_do_not_drop_out_together() -> None:
    assert vqa_accuracy("yes", ["yes"] * 10) == 1.0
    assert vqa_accuracy("no", ["yes"] * 10) == 0.0


def test_texts_are_normalised_only_where_answers_differ() -> None:
    assert vqa_accuracy("The dog", ["The dog"] * 10) == 1.0
    assert vqa_accuracy("dog", ["The dog"] * 10) == 0.0
    assert vqa_accuracy("dog", ["The dog"] * 9 + ["cat"]) == 1.0


def test_one_answer_is_matched_plainly() -> None:
    assert vqa_accuracy("Two.", ["two"]) == 1.0
    assert vqa_accuracy("2", ["two"]) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The two dogs!", "2 dogs"),
        ("dont know", "don't know"),
        ("10,000", "10000"),
        ("left/score", "left score"),
        ("left / score", "left score"),
        ("3.5 m.", "3.5 m"),
        ("An Apple, a pear", "apple pear"),
        ("none", "0"),
    ],
)
def test_the_official_normal_form(text: str, expected: str) -> None:
    assert normalise_vqa(text) == expected
