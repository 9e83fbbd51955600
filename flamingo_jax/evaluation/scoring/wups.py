"""Scores open-ended answers about videos by WUPS, as NExT-OE's eval_oe.py does."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from flamingo_jax.evaluation.metrics.wups import STOPWORDS, wups
from flamingo_jax.evaluation.scoring import files
from flamingo_jax.evaluation.scoring.report import ScoreReport, match
from flamingo_jax.evaluation.statistics import Estimate, mean_estimate
from flamingo_jax.evaluation.words.lemmas import TAGGER, Lemmatiser, split_words
from flamingo_jax.evaluation.words.wordnet import WordNet, read_wordnet

EXACT = ("DB", "DC")
"""Types of question, yes or no and counts, whose answers must be equal."""
MERGED = {"TP": "TN"}
"""Types that count as others: what came before an event, and what after."""
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
            ((row["video"], row["qid"]), (row["answer"], row["type"]))
            for row in files.read_csv(annotations, _COLUMNS)
        ),
        annotations,
    )
    found = read_video_answers(predictions)
    second = read_video_answers(more_references) if more_references else {}
    matched = match(rows, found, "question", skip_incomplete)
    asked = [
        VideoAnswer(
            video,
            found[video, qid],
            [rows[video, qid][0], *([second[video, qid]] if (video, qid) in second else [])],
            rows[video, qid][1],
        )
        for video, qid in matched.scored
    ]
    metrics, items, about = score_video_answers(
        [list(key) for key in matched.scored], asked, read_wordnet(wordnet)
    )
    about["annotations_sha256"] = files.digest(annotations)
    return ScoreReport(metrics, items, about, matched.missing, matched.surplus)


class VideoAnswer(NamedTuple):
    """A predicted answer about a video.

    truths: one or more; the better match counts.
    kind: the type of the question.
    """

    video: str
    prediction: str
    truths: Sequence[str]
    kind: str


def score_video_answers(
    ids: Sequence[Any], answers: Sequence[VideoAnswer], wordnet: WordNet
) -> tuple[dict[str, Estimate], list[dict[str, Any]], dict[str, Any]]:
    """Scores answers by WUPS, with errors over videos.

    Returns: the metrics, items and rules of a `ScoreReport`, with the mean of each type.
    """
    scorer = WupsScorer(wordnet)
    scores: dict[str, list[float]] = defaultdict(list)
    types: dict[str, list[float]] = defaultdict(list)
    items = []
    for one, answer in zip(ids, answers, strict=True):
        kind = MERGED.get(answer.kind, answer.kind)
        scored = {
            name: scorer.score(answer.prediction, list(answer.truths), kind, threshold)
            for name, threshold in THRESHOLDS.items()
        }
        for name, score in scored.items():
            scores[name].append(score)
        for group in (kind, kind[:1]):
            types[group].append(scored["WUPS@0"])
        items.append({"id": one, "type": kind, **scored})
    about = {
        "part_of_speech": TAGGER,
        "by_type": {kind: sum(some) / len(some) for kind, some in sorted(types.items())},
    }
    videos = [answer.video for answer in answers]
    return {name: mean_estimate(some, videos) for name, some in scores.items()}, items, about


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


def read_video_answers(place: str) -> dict[tuple[str, str], str]:
    """Reads {(video, qid): answer}."""
    videos = files.as_dict(files.read_json(place), place)
    return {
        (video, qid): files.field(answers, qid, f"{place}, video {video},", str)
        for video, answers in videos.items()
        for qid in files.as_dict(answers, f"{place}, video {video},")
    }
