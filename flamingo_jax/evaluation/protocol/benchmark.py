"""The interface of a benchmark: a model and settings in, predictions and metrics out."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from flamingo_jax.evaluation.media import MediaRef
from flamingo_jax.evaluation.prompts import WrittenPrompt
from flamingo_jax.evaluation.protocol.journal import NOT_KEPT, Journal
from flamingo_jax.inference.decoding import DecodingConfig
from flamingo_jax.inference.engine import Engine

PAPER_DECODING = DecodingConfig(max_tokens=24, beam_size=3)
"""Beam search with 3 beams, as in the paper."""
RANKS_KEPT = 10
"""Candidates of a prediction that are kept where there are more than `ALL_KEPT`."""
ALL_KEPT = 256


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How a benchmark is run.

    shots: number of support examples before each query.
    text_examples: examples without their images that open-ended zero-shot prompts start with
      (paper 3.3: 2).
    selection: how shots are chosen: one of `selection.shots.SELECTIONS`.
    shot_images: False takes the images of the shots away and leaves their texts: the control
      for what a model learns from the images of its shots rather than from their answers.
    permutations: of close-ended tasks' shots, over which log-likelihoods are averaged (prompt
      ensembling, paper: 6); 1 for the shots in their own order.
    decoding: how open-ended answers are generated.
    seed: of the choice of shots and of sampling.
    folder: where the chosen shots and the features of RICES are kept; "" for nowhere.
    frames: the most frames of a clip; None for as many as in training.
    fps: frames a second of clips; None for the rate of training.
    """

    shots: int = 0
    text_examples: int = 2
    selection: str = "random"
    shot_images: bool = True
    permutations: int = 1
    decoding: DecodingConfig = PAPER_DECODING
    seed: int = 0
    folder: str = ""
    frames: int | None = None
    fps: float | None = None


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A model's answer to one query.

    prompt: as text, its visuals as <image>.
    answers: the ground truths.
    score: by the benchmark's metric, from 0 to 1; 0 until the predictions of all queries are
      scored.
    media: the query's; None where the prediction was read from a file.
    shots: ids of the shots, in their order in the prompt.
    ranking: (number of a candidate, log-likelihood), the most likely first: of all candidates,
      or of the first `RANKS_KEPT` and the true ones where there are more than `ALL_KEPT`. () for
      generated answers.
    rank: how many candidates were ranked before the first true one; -1 for generated answers.
    question_type, cluster, details: the query's.
    """

    id: str
    prompt: str
    text: str
    answers: tuple[str, ...]
    score: float = 0.0
    question_type: str = ""
    cluster: str = ""
    media: MediaRef | None = dataclasses.field(default=None, compare=False)
    shots: tuple[str, ...] = ()
    ranking: tuple[tuple[int, float], ...] = ()
    rank: int = -1
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns what is kept in a file: all but the media."""
        fields = (one.name for one in dataclasses.fields(self) if one.name != "media")
        return {name: getattr(self, name) for name in fields}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Prediction":
        """Makes a prediction of a line of a file.

        Raises: TypeError, KeyError or ValueError for a malformed one.
        """
        ranking = tuple((int(n), float(value)) for n, value in fields["ranking"])
        tuples = {name: tuple(map(str, fields[name])) for name in ("answers", "shots")}
        return cls(**{**fields, **tuples, "ranking": ranking})


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark's metrics and predictions at one number of shots.

    metrics: each from 0 to 1. "accuracy" is the mean score of the predictions;
      "accuracy/<type>" the mean for one type of question, if they have types;
      "majority_answer" the score of giving the training split's most frequent answer to every
      query, if that is known.
    waited: seconds that the model waited for images and clips.
    """

    name: str
    shots: int
    metrics: dict[str, float]
    predictions: list[Prediction]
    waited: float = 0.0

    @property
    def accuracy(self) -> float:
        """Returns the mean score of the predictions."""
        return self.metrics["accuracy"]

    @property
    def title(self) -> str:
        """Returns the name that reports and progress bars show."""
        return title_of(self.name, self.shots)


class Benchmark(Protocol):
    """A set of queries that a model can be run on; implement this to add a benchmark."""

    @property
    def name(self) -> str: ...

    def check(self, settings: EvaluationSettings) -> None:
        """Checks, before any weights are loaded, that the benchmark can be run.

        Raises: UserError where there are no queries, or too few support examples for the
          prompts.
        """

    def run(
        self, engine: Engine, settings: EvaluationSettings, journal: Journal = NOT_KEPT
    ) -> BenchmarkResult:
        """Runs the model on every query and scores its answers.

        journal: keeps the predictions as they are made, and has those of an earlier run.

        Raises: UserError as `check` does, and for an image that cannot be decoded.
        """


def summarise(
    name: str, shots: int, predictions: list[Prediction], waited: float = 0.0
) -> BenchmarkResult:
    """Averages the scores of all predictions, and of each type of question, to metrics."""
    groups: dict[str, list[float]] = defaultdict(list)
    for prediction in predictions:
        groups["accuracy"].append(prediction.score)
        if prediction.question_type:
            groups[f"accuracy/{prediction.question_type}"].append(prediction.score)
    means = {key: float(np.mean(scores)) for key, scores in sorted(groups.items())}
    return BenchmarkResult(name, shots, means, predictions, waited)


def as_text(prompt: WrittenPrompt) -> str:
    """Writes a prompt as one string for reports, each visual as <image>."""
    return "".join(
        part if isinstance(part, str) else "<image>" if isinstance(part, MediaRef) else part.value
        for part in prompt
    )


def title_of(name: str, shots: int) -> str:
    """Writes a benchmark's name with its number of shots, for reports and progress bars."""
    return f"{name}, {shots} shot{'s' * (shots > 1)}" if shots else name
