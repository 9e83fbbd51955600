"""Long proofs: tokens and scores against pycocoevalcap (with Java), nltk and scikit-learn.

`pip install -e '.[score-test]'`; for nltk's part also WordNet 3.0's files (Debian: wordnet-base).
"""

import importlib.util
import pathlib
import random
import shutil
import subprocess

import numpy as np
import pytest

from flamingo_jax.evaluation.metrics.average_precision import average_precision, roc_auc
from flamingo_jax.evaluation.metrics.meteor import meteor
from flamingo_jax.evaluation.metrics.wups import wups
from flamingo_jax.evaluation.ptb.tokenizer import raw_tokens
from flamingo_jax.evaluation.scoring.captions import score_captions, tokenize_groups
from flamingo_jax.evaluation.words import porter
from flamingo_jax.evaluation.words.lemmas import split_words
from flamingo_jax.evaluation.words.wordnet import PLACES, WordNet
from tests.evaluation.make_score_fixtures import caption_scores
from tests.evaluation.score_cases import HARD, captions

pytestmark = pytest.mark.scale
SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data"
"""Real captions and books, beside the repository where there are any."""
FOLDER = next(
    (path for place in PLACES if (path := pathlib.Path(place).expanduser()).is_dir()), None
)
needs_java = pytest.mark.skipif(
    shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None,
    reason="Java or pycocoevalcap is not installed",
)
needs_wordnet = pytest.mark.skipif(
    FOLDER is None or importlib.util.find_spec("nltk") is None,
    reason="WordNet or nltk is not installed",
)


def java_tokens(text: str, folder: pathlib.Path) -> str:
    """The output of the tokenizer as pycocoevalcap calls it."""
    import pycocoevalcap.tokenizer.ptbtokenizer as module

    jar = pathlib.Path(module.__file__).parent / module.STANFORD_CORENLP_3_4_1_JAR
    path = folder / "captions.txt"
    path.write_bytes(text.encode())
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    return subprocess.run(
        [*command, "-preserveLines", "-lowerCase", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    ).stdout.decode(errors="replace")


def made_lines(seed: int, lines: int) -> list[str]:
    """Lines of hard fragments, with and without spaces, and single characters of all kinds."""
    rng = random.Random(seed)
    fragments = [word for line in HARD for word in line.split(" ")]
    spans = [
        (32, 126),
        (32, 126),
        (128, 0x2FF),
        (0x2000, 0x22FF),
        (0x300, 0xD7FF),
        (0xE000, 0xFFFD),
    ]

    def piece() -> str:
        kind = rng.random()
        if kind < 0.8:
            return rng.choice(fragments)
        return chr(rng.randint(*rng.choice(spans))) if kind < 0.97 else chr(rng.randint(1, 31))

    breaks = str.maketrans(dict.fromkeys("\n\r\u2028\u2029\x0b\x0c", " "))
    return [
        "".join(piece() + rng.choice(["", " ", " "]) for _ in range(rng.randint(1, 9))).translate(
            breaks
        )
        for _ in range(lines)
    ]


@needs_java
@pytest.mark.parametrize("seed", range(4))
def test_made_captions_have_javas_tokens(seed: int, tmp_path: pathlib.Path) -> None:
    lines = made_lines(seed, 10_000)
    text = "\n".join(lines)
    expected, found = java_tokens(text, tmp_path).split("\n"), raw_tokens(text).split("\n")
    assert [case for case in zip(lines, expected, found, strict=True) if case[1] != case[2]] == []


@needs_java
@pytest.mark.skipif(not SHARED.is_dir(), reason="there are no captions beside the repository")
def test_real_captions_have_javas_tokens(tmp_path: pathlib.Path) -> None:
    files = [*SHARED.glob("*/*.jsonl"), *SHARED.glob("text/*.txt")]
    lines = [
        line.strip()
        for file in files
        for line in file.read_text(errors="replace").replace("\r", " ").split("\n")[:8000]
    ]
    assert len(lines) > 10_000
    text = "\n".join(line for line in lines if line)
    assert raw_tokens(text) == java_tokens(text, tmp_path)


@needs_java
@pytest.mark.parametrize(("images", "references"), [(300, 5), (1, 5), (30, 10), (7, 1)])
def test_scores_are_pycocoevalcaps(images: int, references: int) -> None:
    made = captions(images, references, seed=images)
    expected = caption_scores(*made)["scores"]
    metrics, items = score_captions(*made, resamples=2)
    for name, scores in expected.items():
        assert metrics[name].score == pytest.approx(scores["set"], abs=1e-9)
        assert [item[name] for item in items] == pytest.approx(scores["items"], abs=1e-9)


@needs_java
def test_meteor_is_pycocoevalcaps() -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    predictions, truths = (tokenize_groups(g) for g in _groups(*captions(40, 5, seed=3)))
    whole, scores = meteor([group[0] for group in predictions], truths)
    expected = Meteor().compute_score(dict(enumerate(truths)), dict(enumerate(predictions)))
    assert (whole, scores) == (expected[0], expected[1])


def _groups(predictions: list[str], truths: list[list[str]]) -> tuple[list[list[str]], ...]:
    return [[text] for text in predictions], truths


@needs_wordnet
def test_words_are_nltks(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FOLDER is not None
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    from nltk.stem import PorterStemmer
    from nltk.tokenize.treebank import TreebankWordTokenizer

    # Debian leaves out two files that nltk reads and that say nothing of words.
    copy = shutil.copytree(FOLDER, tmp_path / "corpora" / "wordnet")
    (copy / "lexnames").write_text("".join(f"{n:02}\tname\t1\n" for n in range(45)))
    (copy / "index.sense").touch()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    theirs, ours = WordNetCorpusReader(str(copy), None), WordNet(FOLDER)
    rng = random.Random(0)
    index = [line.split()[0] for line in (copy / "index.noun").read_text().split("\n")[29:-1]]
    words = rng.sample(index, 1500) + "dogs playing sat left best was people run yes not".split()
    similar = similarity_of(theirs)
    for word in words:
        assert porter.stem(word) == PorterStemmer().stem(word)
        for pos in "nvar":
            assert ours.base_forms(word, pos) == theirs._morphy(word, pos)
        other = rng.choice(words)
        assert wups([word], [other], ours) == pytest.approx(similar(word, other), abs=1e-12)
    for line in (
        'He can\'t "run", cannot (stop).',
        "it's 3:45 -- the dogs' $5!",
        "I'm gonna go...",
    ):
        assert split_words(line) == TreebankWordTokenizer().tokenize(line)


def similarity_of(reader):  # type: ignore[no-untyped-def]
    """NExT-OE's similarity of two words with nltk's reader."""

    def similar(first: str, second: str) -> float:
        if first == second:
            return 1.0
        one, other = reader.synsets(first), reader.synsets(second)
        return (one[0].wup_similarity(other[0]) or 0.0) if one and other else 0.0

    # The worse direction, as both words may differ in their depths.
    return lambda first, second: min(similar(first, second), similar(second, first))


def test_areas_are_scikit_learns() -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = int(rng.integers(4, 80))
        labels = rng.random(size) < 0.4
        labels[:2] = True, False
        scores = rng.integers(0, rng.integers(2, 60), size).astype(np.float32)
        weights = rng.random(size) + 0.01
        expected = sklearn.average_precision_score(labels, scores, sample_weight=weights)
        assert average_precision(labels, scores, weights) == pytest.approx(expected, abs=1e-12)
        assert roc_auc(labels, scores) == pytest.approx(sklearn.roc_auc_score(labels, scores))
        expected = sklearn.roc_auc_score(labels, scores, sample_weight=weights)
        assert roc_auc(labels, scores, weights) == pytest.approx(expected, abs=1e-12)
