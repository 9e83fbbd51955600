"""The interface of a benchmark: a model and settings in, predictions and metrics out."""

import dataclasses
from collections import defaultdict
from typing import Protocol

import numpy as np

from flamingo_jax.inference.decoding import DecodingConfig
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.prompts import Prompt
from flamingo_jax.processing.visuals import Visual

PAPER_DECODING = DecodingConfig(max_tokens=24, beam_size=3)
"""Beam search with 3 beams, as in the paper."""


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
    """

    shots: int = 0
    text_examples: int = 2
    selection: str = "random"
    shot_images: bool = True
    permutations: int = 1
    decoding: DecodingConfig = PAPER_DECODING
    seed: int = 0
    folder: str = ""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A model's answer to one query.

    prompt: as text, its visuals as <image>.
    visual: the query's.
    answers: the ground truths.
    score: by the benchmark's metric, from 0 to 1.
    """

    id: str
    prompt: str
    visual: Visual
    text: str
    answers: tuple[str, ...]
    score: float
    question_type: str = ""


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark's metrics and predictions at one number of shots.

    metrics: each from 0 to 1. "accuracy" is the mean score of the predictions;
      "accuracy/<type>" the mean for one type of question, if they have types;
      "majority_answer" the score of giving the training split's most frequent answer to every
      query, if that is known.
    """

    name: str
    shots: int
    metrics: dict[str, float]
    predictions: list[Prediction]

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

    def run(self, engine: Engine, settings: EvaluationSettings) -> BenchmarkResult:
        """Runs the model on every query and scores its answers.

        Raises: UserError as `check` does.
        """


def summarise(name: str, shots: int, predictions: list[Prediction]) -> BenchmarkResult:
    """Averages the scores of all predictions, and of each type of question, to metrics."""
    groups: dict[str, list[float]] = defaultdict(list)
    for prediction in predictions:
        groups["accuracy"].append(prediction.score)
        if prediction.question_type:
            groups[f"accuracy/{prediction.question_type}"].append(prediction.score)
    means = {key: float(np.mean(scores)) for key, scores in sorted(groups.items())}
    return BenchmarkResult(name, shots, means, predictions)


def as_text(prompt: Prompt) -> str:
    """Writes a prompt as one string for reports, each visual as <image>."""
    return "".join(
        part if isinstance(part, str) else "<image>" if isinstance(part, Visual) else part.value
        for part in prompt
    )


def title_of(name: str, shots: int) -> str:
    """Writes a benchmark's name with its number of shots, for reports and progress bars."""
    return f"{name}, {shots} shots" if shots else name
