"""Open-ended benchmarks, whose answers the model generates: captioning and visual question
answering (paper 3.1).
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation import prompts
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.metrics.exact_match import Metric, exact_match
from flamingo_jax.evaluation.metrics.vqa_accuracy import vqa_accuracy
from flamingo_jax.evaluation.protocol.asking import Asked
from flamingo_jax.evaluation.protocol.benchmark import (
    BenchmarkResult,
    EvaluationSettings,
    Prediction,
    summarise,
)
from flamingo_jax.evaluation.protocol.few_shot import ask_few_shot, check_examples
from flamingo_jax.evaluation.protocol.journal import NOT_KEPT, Journal
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.prompts import Prompt
from flamingo_jax.processing.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class OpenEnded:
    """Generates an answer to every query and scores it by `metric`.

    metric: of one answer; None where predictions are scored together, by another.
    queries: examples to answer.
    support: examples that shots are chosen from.
    template: the prompt format.
    majority_answer: the training split's most frequent answer; the score of always giving it
      is reported as a baseline. "" where it is not known.
    """

    name: str
    queries: Sequence[BenchmarkExample]
    support: Sequence[BenchmarkExample]
    template: prompts.PromptTemplate
    metric: Metric | None
    majority_answer: str = ""

    def check(self, settings: EvaluationSettings) -> None:
        """Raises UserError where there are too few examples, or several orders of shots."""
        if settings.permutations > 1:
            raise UserError(
                f"{self.name} is open-ended, and only log-likelihoods of given answers are averaged"
                " over permutations of the shots: set permutations to 1"
            )
        check_examples(self, settings)

    def text_examples(self, settings: EvaluationSettings) -> int:
        """Returns the number of text-only examples of a zero-shot prompt."""
        return settings.text_examples

    def further(self, settings: EvaluationSettings, tokenizer: Tokenizer) -> int:
        """Returns the number of tokens of an answer at most."""
        return settings.decoding.max_tokens

    def run(
        self, engine: Engine, settings: EvaluationSettings, journal: Journal = NOT_KEPT
    ) -> BenchmarkResult:
        """Generates every answer with `settings.decoding` and scores it."""
        self.check(settings)

        def answer(asked: Sequence[Asked], orders: list[list[Prompt]]) -> list[Prediction]:
            found = engine.generate(orders[0], settings.decoding, seed=settings.seed)
            return [
                one.predict(prompts.clean(completion.text))
                for one, completion in zip(asked, found, strict=True)
            ]

        predictions, waited = ask_few_shot(self, engine, settings, answer, journal)
        if self.metric is None:
            return BenchmarkResult(self.name, settings.shots, {}, predictions, waited)
        predictions = [
            dataclasses.replace(one, score=self.metric(one.text, one.answers))
            for one in predictions
        ]
        result = summarise(self.name, settings.shots, predictions, waited)
        if not self.majority_answer:
            return result
        majority = float(
            np.mean([self.metric(self.majority_answer, query.answers) for query in self.queries])
        )
        return dataclasses.replace(result, metrics=result.metrics | {"majority_answer": majority})


def captioning(
    name: str,
    queries: Sequence[BenchmarkExample],
    support: Sequence[BenchmarkExample],
    metric: Metric = exact_match,
    template: prompts.PromptTemplate = prompts.CAPTION,
) -> OpenEnded:
    """Makes a captioning benchmark, `<image>Output: ...`.

    metric: by default exact match with one of the example's captions, as synthetic data
      allows.
    """
    return OpenEnded(name, queries, support, template, metric)


def question_answering(
    name: str,
    queries: Sequence[BenchmarkExample],
    support: Sequence[BenchmarkExample],
    template: prompts.PromptTemplate = prompts.QUESTION,
    majority_answer: str = "",
) -> OpenEnded:
    """Makes a visual question answering benchmark, `<image>Question: ... Answer: ...`, scored
    by VQA accuracy.
    """
    return OpenEnded(name, queries, support, template, vqa_accuracy, majority_answer)


def most_frequent_answer(answers: Iterable[Sequence[str]]) -> str:
    """Finds the most frequent of all records' answers, the first of equally frequent ones; ""
    where there are none.
    """
    counts = Counter(answer for some in answers for answer in some)
    return max(counts, key=counts.__getitem__, default="")
