"""Scores open-ended answers about videos by WUPS, as NExT-OE's eval_oe.py does."""

from collections import defaultdict

from flamingo_jax.evaluation.metrics.wups import STOPWORDS, wups
from flamingo_jax.evaluation.scoring import files
from flamingo_jax.evaluation.scoring.report import ScoreReport, match
from flamingo_jax.evaluation.statistics import mean_estimate
from flamingo_jax.evaluation.words.lemmas import TAGGER, Lemmatiser, split_words
from flamingo_jax.evaluation.words.wordnet import WordNet, find_wordnet

EXACT = ("DB", "DC")
"""Types of question, yes or no and counts, whose answers must be equal."""
THRESHOLDS = {"WUPS@0": 0.0, "WUPS@0.9": 0.9}
_COLUMNS = ("video", "qid", "answer", "type")


def score_wups_files(
    annotations: str,
    predictions: str,
    more_references: str = "",
    *,
    wordnet: str = "",
    skip_incomplete: bool = False,
) -> ScoreReport:
    """Scores a file of predicted answers.

    Args:
      annotations: NExT-OE's CSV with the columns video, qid, answer and type.
      predictions: {video: {qid: answer}}.
      more_references: second answers in the same form; of the two, the better match counts.
      wordnet: folder of WordNet 3.0's files; by default one that is found.
      skip_incomplete: whether to go on with the questions that have a prediction.

    Raises: UserError for a malformed file, missing or surplus predictions, and without WordNet.
    """
    rows = files.by_id(
        (
            (
                (row["video"], row["qid"]),
                (row["answer"], "TN" if row["type"] == "TP" else row["type"]),
            )
            for row in files.read_csv(annotations, _COLUMNS)
        ),
        annotations,
    )
    found, second = _answers(predictions), _answers(more_references) if more_references else {}
    matched = match(rows, found, "question", skip_incomplete)
    scorer = WupsScorer(WordNet(find_wordnet(wordnet)))
    scores: dict[str, list[float]] = defaultdict(list)
    types: dict[str, list[float]] = defaultdict(list)
    items = []
    for key in matched.scored:
        answer, kind = rows[key]
        truths = [answer, second[key]] if key in second else [answer]
        scored = {
            name: scorer.score(found[key], truths, kind, threshold)
            for name, threshold in THRESHOLDS.items()
        }
        for name, score in scored.items():
            scores[name].append(score)
        for group in (kind, kind[:1]):
            types[group].append(scored["WUPS@0"])
        items.append({"id": list(key), "type": kind, **scored})
    about = {
        "part_of_speech": TAGGER,
        "by_type": {kind: sum(some) / len(some) for kind, some in sorted(types.items())},
        "annotations_sha256": files.digest(annotations),
    }
    videos = [video for video, _ in matched.scored]
    metrics = {name: mean_estimate(some, videos) for name, some in scores.items()}
    return ScoreReport(metrics, items, about, matched.missing, matched.surplus)


class WupsScorer:
    """Scores single answers."""

    def __init__(self, wordnet: WordNet):
        self._wordnet = wordnet
        self._lemmatiser = Lemmatiser(wordnet)

    def score(self, prediction: str, truths: list[str], kind: str, threshold: float) -> float:
        """Scores an answer against the better of its ground truths, 0 to 1.

        Args:
          prediction: the model's answer.
          truths: one or more answers.
          kind: the type of the question; those in `EXACT` need equal answers.
          threshold: of WUPS.
        """
        own, *others = (self._content(text) for text in (prediction, *truths))
        if kind in EXACT:
            return float(own in others)
        words = split_words(own)
        return max(wups(words, split_words(text), self._wordnet, threshold) for text in others)

    def _content(self, text: str) -> str:
        """Returns the base forms of a text without stop words."""
        return " ".join(w for w in self._lemmatiser.sentence(text) if w not in STOPWORDS)


def _answers(place: str) -> dict[tuple[str, str], str]:
    """Reads {(video, qid): answer}."""
    videos = files.as_dict(files.read_json(place), place)
    return {
        (video, qid): files.field(answers, qid, f"{place}, video {video},", str)
        for video, answers in videos.items()
        for qid in files.as_dict(answers, f"{place}, video {video},")
    }
