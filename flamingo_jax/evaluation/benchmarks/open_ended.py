"""Open-ended benchmarks, whose answers the model generates: captioning and visual question
answering (paper 3.1).
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation import prompts
from flamingo_jax.evaluation.benchmarks.benchmark import (
    BenchmarkResult,
    EvaluationSettings,
    summarise,
    title_of,
)
from flamingo_jax.evaluation.benchmarks.few_shot import (
    check_examples,
    few_shot_prompts,
    prediction_of,
)
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.metrics.exact_match import Metric, exact_match
from flamingo_jax.evaluation.metrics.vqa_accuracy import vqa_accuracy
from flamingo_jax.inference.engine import Engine
from flamingo_jax.progress import Bar


@dataclasses.dataclass(frozen=True)
class OpenEnded:
    """Generates an answer to every query and scores it by `metric`.

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
    metric: Metric
    majority_answer: str = ""

    def check(self, settings: EvaluationSettings) -> None:
        """Raises UserError where there are too few examples, or several orders of shots."""
        if settings.permutations > 1:
            raise UserError(
                f"{self.name} is open-ended, and only log-likelihoods of given answers are averaged"
                " over permutations of the shots: set permutations to 1"
            )
        check_examples(self, settings, settings.text_examples)

    def run(self, engine: Engine, settings: EvaluationSettings) -> BenchmarkResult:
        """Generates every answer with `settings.decoding` and scores it."""
        self.check(settings)
        asked = few_shot_prompts(self, engine, settings, settings.text_examples)
        with Bar(title_of(self.name, settings.shots), len(asked)) as bar:
            completions = engine.generate(
                asked, settings.decoding, seed=settings.seed, progress=bar.advance
            )
        predictions = []
        for query, prompt, completion in zip(self.queries, asked, completions, strict=True):
            text = prompts.clean(completion.text)
            predictions.append(prediction_of(query, prompt, text, self.metric(text, query.answers)))
        result = summarise(self.name, settings.shots, predictions)
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
