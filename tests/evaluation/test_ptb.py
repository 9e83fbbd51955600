"""The tokenizer of captions against Java's, and its scanner against Python's re."""

import json
import pathlib
import random
import re

import pytest

from flamingo_jax.evaluation.ptb.longest_match import CharSet, Parser, Scanner
from flamingo_jax.evaluation.ptb.tokenizer import raw_tokens, tokenize
from tests.evaluation.score_cases import HARD, captions

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def test_hard_captions_have_javas_tokens() -> None:
    expected = json.loads((FIXTURES / "hard_captions.json").read_text())
    assert dict(zip(HARD, tokenize(HARD), strict=True)) == dict(zip(HARD, expected, strict=True))


def test_made_captions_have_javas_tokens() -> None:
    predictions, _ = captions(40, 5, seed=1)
    assert tokenize(predictions) == json.loads((FIXTURES / "captions.json").read_text())["tokens"]


def test_other_line_breaks_do_not_shift_captions() -> None:
    assert tokenize(["a\r\nb\u2028c", "d\ne", ""]) == ["a b c", "d e", ""]


def test_no_captions_have_no_tokens() -> None:
    assert tokenize([]) == [] and raw_tokens("") == ""


@pytest.mark.parametrize(
    "pattern", ["a(b|c)*d?", "[a-c]{2,3}x", "(ab|a)(bc|c)?", "[^ab]+", "a+b+|b{2}", "(a|ab)(c|bcd)"]
)
def test_the_longest_match_is_that_of_all_substrings(pattern: str) -> None:
    scanner = Scanner([Parser({}).parse(pattern)])
    rng = random.Random(pattern)
    for _ in range(200):
        text = "".join(rng.choice("abcdx") for _ in range(8))
        ends = [end for end in range(1, 9) if re.fullmatch(pattern, text[:end])]
        assert scanner.longest(text, 0) == ((0, ends[-1]) if ends else (-1, 0))
        assert scanner.ends(text, 0, 8) == ends


def test_of_equal_matches_the_first_pattern_wins() -> None:
    parse = Parser({"vowel": CharSet([(97, 97), (101, 101)])}).parse
    scanner = Scanner([parse("ab"), parse(r"\p{vowel}b|abc"), parse("abd?")])
    assert scanner.longest("ab", 0) == (0, 2)
    assert scanner.longest("abc", 0) == (1, 3)
    assert scanner.longest("xAbd", 1) == (2, 4)
    assert scanner.longest("eb", 0) == (1, 2)


@pytest.mark.parametrize("pattern", ["(a", "a)", "*a", "[a", "a{2"])
def test_a_malformed_pattern_is_an_error(pattern: str) -> None:
    with pytest.raises((ValueError, IndexError)):
        Parser({}).parse(pattern)
