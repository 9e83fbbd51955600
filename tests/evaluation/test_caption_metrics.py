"""CIDEr, BLEU and ROUGE-L against pycocoevalcap's scores, and plain CIDEr against its formula."""

import itertools
import json
import math
import pathlib

import pytest

from flamingo_jax.evaluation.metrics.cider import cider
from flamingo_jax.evaluation.metrics.rouge_l import common_length, rouge_l
from flamingo_jax.evaluation.scoring.captions import score_captions
from tests.evaluation.score_cases import captions

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def test_scores_are_pycocoevalcaps() -> None:
    metrics, items = score_captions(*captions(40, 5, seed=1), resamples=10)
    expected = json.loads((FIXTURES / "captions.json").read_text())["scores"]
    assert set(expected) < set(metrics)
    for name, scores in expected.items():
        assert metrics[name].score == pytest.approx(scores["set"], abs=1e-9)
        assert [item[name] for item in items] == pytest.approx(scores["items"], abs=1e-9)


def test_one_image_has_no_rarity() -> None:
    metrics, _ = score_captions(["a dog runs"], [["a dog runs"]], resamples=10)
    assert metrics["CIDEr-D"].score == 0.0
    assert metrics["BLEU-1"].score == pytest.approx(1.0)
    assert metrics["ROUGE-L"].score == 1.0


def test_plain_cider_is_the_cosine_of_its_formula() -> None:
    predictions, references = ["a b a", "c d"], [["a b", "b a a"], ["c d"]]

    def counts(text: str, n: int) -> dict[tuple[str, ...], int]:
        words = text.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        return {gram: grams.count(gram) for gram in grams}

    def vector(text: str, n: int) -> dict[tuple[str, ...], float]:
        def idf(gram: tuple[str, ...]) -> float:
            number = sum(any(gram in counts(r, n) for r in group) for group in references)
            return math.log(2 / max(1, number))

        return {gram: count * idf(gram) for gram, count in counts(text, n).items()}

    for place, (text, group) in enumerate(zip(predictions, references, strict=True)):
        total = 0.0
        for n, other in itertools.product(range(1, 5), group):
            left, right = vector(text, n), vector(other, n)
            norm = math.hypot(*left.values()) * math.hypot(*right.values())
            if norm:
                total += sum(w * right.get(gram, 0) for gram, w in left.items()) / norm
        expected = 10 * total / 4 / len(group)
        assert cider(predictions, references)[place] == pytest.approx(expected)


def test_the_common_subsequence_is_that_of_dynamic_programming() -> None:
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return 0
        if a[0] == b[0]:
            return 1 + slow(a[1:], b[1:])
        return max(slow(a[1:], b), slow(a, b[1:]))

    for pair in itertools.product(["", "a", "abcab", "bcacb", "aaaa", "cbacba"], repeat=2):
        assert common_length(*pair) == slow(*pair)
    assert rouge_l("", [""]) == 1.0 and rouge_l("a", ["b"]) == 0.0
