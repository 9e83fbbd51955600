"""Close-ended benchmarks: classification by log-likelihood of the class names (paper 3.1)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

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
    permuted_prompts,
    prediction_of,
)
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.metrics.exact_match import exact_match
from flamingo_jax.inference.engine import Engine
from flamingo_jax.progress import Bar


@dataclasses.dataclass(frozen=True)
class Classification:
    """Predicts the class whose name has the highest log-likelihood after the prompt, or the
    highest mean over several orders of the shots (`EvaluationSettings.permutations`).

    queries: examples to classify; their answers are the true class.
    support: examples that shots are chosen from.
    classes: all class names. The score of one sums over the tokens of its name and <EOC>.
    template: the prompt format. Zero-shot prompts have no text-only examples (paper 3.1).
    """

    name: str
    queries: Sequence[BenchmarkExample]
    support: Sequence[BenchmarkExample]
    classes: Sequence[str]
    template: prompts.PromptTemplate = prompts.CAPTION

    def check(self, settings: EvaluationSettings) -> None:
        """Raises UserError where there are too few examples."""
        check_examples(self, settings, 0)

    def run(self, engine: Engine, settings: EvaluationSettings) -> BenchmarkResult:
        """Scores every class for every query and predicts the most likely one."""
        self.check(settings)
        if settings.shots > 1 and settings.permutations > 1:
            asked = permuted_prompts(self, engine, settings)
        else:
            asked = [few_shot_prompts(self, engine, settings, 0)]
        # The prompt ends without a space: it belongs to the first token of the class name.
        candidates = [[f" {name}" for name in self.classes]] * len(self.queries)
        total = len(self.queries) * len(asked)
        with Bar(title_of(self.name, settings.shots), total) as bar:
            found = [
                engine.log_likelihoods(written, candidates, progress=bar.advance)
                for written in asked
            ]
        rankings = [np.mean(rows, axis=0) for rows in zip(*found, strict=True)]
        predictions = []
        for query, prompt, ranking in zip(self.queries, asked[0], rankings, strict=True):
            text = self.classes[int(np.argmax(ranking))]
            predictions.append(prediction_of(query, prompt, text, exact_match(text, query.answers)))
        return summarise(self.name, settings.shots, predictions)
