"""WUPS and the lemmas it compares, on a small WordNet whose values are known by hand."""

import pathlib

import pytest

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.metrics.wups import wups
from flamingo_jax.evaluation.scoring.wups import WupsScorer
from flamingo_jax.evaluation.words import okvqa_stems, porter
from flamingo_jax.evaluation.words.lemmas import Lemmatiser, split_words
from flamingo_jax.evaluation.words.wordnet import WordNet, find_wordnet
from tests.evaluation import small_wordnet


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> WordNet:
    return WordNet(small_wordnet.write(tmp_path_factory.mktemp("words") / "wordnet"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("dog", "cat"), 2 * 2 / (3 + 3)),
        (("poodle", "dog"), 2 * 3 / (4 + 3)),
        (("dog", "toy"), 2 * 1 / (3 + 2)),
        (("dog", "dog"), 1.0),
        # The first meanings of "play" are nouns; a verb and a noun meet at a root above all, two
        # steps above "run", four above "poodle".
        (("run", "leave"), 2 / (2 + 1 + 1 + 1)),
        (("run", "poodle"), 2 / (2 + 1 + 4 + 1)),
    ],
)
def test_the_similarity_is_wu_and_palmers(
    wordnet: WordNet, words: tuple[str, str], expected: float
) -> None:
    first, second = (wordnet.first_meaning(word) for word in words)
    assert first and second
    assert wordnet.similarity(first, second) == pytest.approx(expected)
    assert wordnet.similarity(second, first) == pytest.approx(expected)


def test_words_similar_to_none_are_skipped(wordnet: WordNet) -> None:
    similar = 2 * 2 / 6
    assert wups(["dog"], ["cat"], wordnet) == pytest.approx(similar)
    assert wups(["dog", "xyz"], ["cat"], wordnet) == pytest.approx(similar)
    assert wups(["dog"], ["cat"], wordnet, 0.9) == pytest.approx(0.1 * similar)
    assert wups(["xyz"], ["cat"], wordnet) == wups([], ["cat"], wordnet) == 0.0
    assert wups(["xyz"], ["xyz"], wordnet) == 1.0
    # Each word counts in its worse direction.
    assert wups(["dog"], ["dog", "toy"], wordnet) == pytest.approx(2 / 5)


def test_a_word_is_of_its_most_frequent_kind(wordnet: WordNet) -> None:
    lemmas = Lemmatiser(wordnet)
    assert lemmas.part_of_speech("playing") == "v" and lemmas.part_of_speech("plays") == "v"
    assert lemmas.part_of_speech("dogs") == "n" and lemmas.part_of_speech("unknown") == "n"
    assert lemmas.sentence("The dogs played, left") == ["the", "dog", "play", ",", "leave"]


def test_yes_and_counts_must_be_equal(wordnet: WordNet) -> None:
    scorer = WupsScorer(wordnet)
    assert scorer.score("two dogs", ["two dog"], "DC", 0.0) == 1.0
    assert scorer.score("dog", ["cat"], "DC", 0.0) == 0.0
    assert scorer.score("the dog", ["cat", "a poodle"], "CW", 0.0) == pytest.approx(6 / 7)


def test_stems_are_learned_from_raw_answers(wordnet: WordNet) -> None:
    stems = okvqa_stems.learn_stems(
        [("riding bikes", "ride bike"), ("riding", "ride"), ("two words", "one")]
    )
    assert stems == {"riding": "ride", "bikes": "bike"}
    assert okvqa_stems.stem_answer("Riding dogs playing", stems, wordnet) == "ride dog play"


@pytest.mark.parametrize(
    ("word", "stem"),
    [
        ("caresses", "caress"), ("ponies", "poni"), ("ties", "tie"), ("cats", "cat"),
        ("agreed", "agre"), ("plastered", "plaster"), ("hopping", "hop"), ("falling", "fall"),
        ("filing", "file"), ("happy", "happi"), ("relational", "relat"), ("rational", "ration"),
        ("digitizer", "digit"), ("vietnamization", "vietnam"), ("electrical", "electr"),
        ("goodness", "good"), ("adjustment", "adjust"), ("adoption", "adopt"), ("rate", "rate"),
        ("controll", "control"), ("roll", "roll"), ("dying", "die"), ("news", "news"), ("by", "by"),
    ],
)  # fmt: skip
def test_stems_are_those_of_porters_paper(word: str, stem: str) -> None:
    assert porter.stem(word) == stem


def test_words_are_split_as_in_the_treebank() -> None:
    assert split_words('He can\'t "run", cannot (stop).') == [
        "He", "ca", "n't", "``", "run", "''", ",", "can", "not", "(", "stop", ")", ".",
    ]  # fmt: skip


def test_missing_files_are_told_in_a_sentence(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="--wordnet names the folder"):
        WordNet(tmp_path)
    assert find_wordnet(str(tmp_path)) == tmp_path
