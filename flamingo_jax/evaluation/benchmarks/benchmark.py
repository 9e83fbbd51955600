"""What every benchmark is: settings and a model in, predictions and metrics out."""

import dataclasses
from collections import defaultdict
from typing import Protocol

import numpy as np

from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.generation import DecodingConfig
from flamingo_jax.inference.prompts import Prompt
from flamingo_jax.processing.visuals import Visual

PAPER_DECODING = DecodingConfig(max_tokens=24, beam_size=3)


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How a benchmark is run.

    shots: support examples before each query.
    text_examples: text-only examples of open-ended zero-shot prompts (paper: 2).
    selection: of few-shot examples, "random" or "rices".
    """

    shots: int = 0
    text_examples: int = 2
    selection: str = "random"
    decoding: DecodingConfig = PAPER_DECODING
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A model's answer to one query, with the prompt that it was given and its score, 0 to 1."""

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

    metrics: {"accuracy": mean score over predictions, "accuracy/<type>" where questions have
      types, and "majority_answer", the score of giving the training split's most frequent
      answer to every query, where that is known}, each 0 to 1.
    """

    name: str
    shots: int
    metrics: dict[str, float]
    predictions: list[Prediction]

    @property
    def accuracy(self) -> float:
        """The mean score over all predictions."""
        return self.metrics["accuracy"]

    @property
    def title(self) -> str:
        """How a report and a progress bar name it."""
        return title_of(self.name, self.shots)


class Benchmark(Protocol):
    """Anything that a model can be run on."""

    @property
    def name(self) -> str: ...

    def check(self, settings: EvaluationSettings) -> None:
        """Raises UserError where there is nothing to evaluate on, or too little support for the
        prompts.
        """

    def run(self, engine: Engine, settings: EvaluationSettings) -> BenchmarkResult:
        """Asks the model every query.

        Raises UserError as `check` does.
        """


def summarise(name: str, shots: int, predictions: list[Prediction]) -> BenchmarkResult:
    """Averages the scores of all predictions, and those of each type of question."""
    groups: dict[str, list[float]] = defaultdict(list)
    for prediction in predictions:
        groups["accuracy"].append(prediction.score)
        if prediction.question_type:
            groups[f"accuracy/{prediction.question_type}"].append(prediction.score)
    means = {key: float(np.mean(scores)) for key, scores in sorted(groups.items())}
    return BenchmarkResult(name, shots, means, predictions)


def as_text(prompt: Prompt) -> str:
    """Writes a prompt as a person reads it, with its visuals as tags."""
    return "".join(
        part if isinstance(part, str) else "<image>" if isinstance(part, Visual) else part.value
        for part in prompt
    )


def title_of(name: str, shots: int) -> str:
    """Names a benchmark at a number of shots, for people."""
    return f"{name}, {shots} shots" if shots else name
