"""Close-ended benchmarks: classification by log-likelihood of the class names (paper 3.1)."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation import prompts
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.metrics.exact_match import exact_match
from flamingo_jax.evaluation.protocol.asking import Asked
from flamingo_jax.evaluation.protocol.benchmark import (
    ALL_KEPT,
    RANKS_KEPT,
    BenchmarkResult,
    EvaluationSettings,
    Prediction,
    summarise,
)
from flamingo_jax.evaluation.protocol.few_shot import ask_few_shot, check_examples
from flamingo_jax.evaluation.protocol.journal import NOT_KEPT, Journal
from flamingo_jax.evaluation.protocol.lengths import longest_candidate
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.prompts import Prompt
from flamingo_jax.processing.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Classification:
    """Predicts the class whose name has the highest log-likelihood after the prompt, or the
    highest mean over several orders of the shots (`EvaluationSettings.permutations`).

    queries: examples to classify; their answers are the true class.
    support: examples that shots are chosen from.
    classes: all class names; those of a query with `candidates` of its own are these. The score
      of one sums over the tokens of its name and <EOC>.
    template: the prompt format. Zero-shot prompts have no text-only examples (paper 3.1).
    scored: False where predictions are scored together, by another metric than accuracy.
    """

    name: str
    queries: Sequence[BenchmarkExample]
    support: Sequence[BenchmarkExample]
    classes: Sequence[str]
    template: prompts.PromptTemplate = prompts.CAPTION
    scored: bool = True

    def check(self, settings: EvaluationSettings) -> None:
        """Raises UserError where there are too few examples, or two classes of one name."""
        check_examples(self, settings)
        twice = [name for name, count in Counter(self.classes).items() if count > 1]
        if twice:
            raise UserError(
                f"{self.name} has {len(twice)} names of several classes, such as {twice[0]!r}, that"
                " no answer could tell apart: give each class a name of its own"
            )
        for query in self.queries:
            if not self._candidates(query):
                raise UserError(f"{self.name} has no candidate answers for the query {query.id}")

    def text_examples(self, settings: EvaluationSettings) -> int:
        """Returns 0: zero-shot prompts have no text-only examples."""
        return 0

    def further(self, settings: EvaluationSettings, tokenizer: Tokenizer) -> int:
        """Returns the number of tokens of the longest candidate."""
        texts = {text for query in self.queries for text in self._candidates(query)}
        return longest_candidate(texts, tokenizer)

    def _candidates(self, query: BenchmarkExample) -> Sequence[str]:
        return query.candidates or self.classes

    def run(
        self, engine: Engine, settings: EvaluationSettings, journal: Journal = NOT_KEPT
    ) -> BenchmarkResult:
        """Scores every class for every query and predicts the most likely one."""
        self.check(settings)

        def answer(asked: Sequence[Asked], orders: list[list[Prompt]]) -> list[Prediction]:
            names = [self._candidates(one.query) for one in asked]
            # The prompt ends without a space: it belongs to the first token of the class name.
            # Queries with the same classes share one list, which is tokenised once.
            spaced = {id(some): [f" {name}" for name in some] for some in names}
            candidates = [spaced[id(some)] for some in names]
            found = [engine.log_likelihoods(prompts, candidates) for prompts in orders]
            means = [np.mean(rows, axis=0) for rows in zip(*found, strict=True)]
            return list(map(ranked, asked, names, means))

        predictions, waited = ask_few_shot(self, engine, settings, answer, journal)
        if not self.scored:
            return BenchmarkResult(self.name, settings.shots, {}, predictions, waited)
        predictions = [
            dataclasses.replace(one, score=exact_match(one.text, one.answers))
            for one in predictions
        ]
        return summarise(self.name, settings.shots, predictions, waited)


def ranked(asked: Asked, candidates: Sequence[str], scores: np.ndarray) -> Prediction:
    """Returns the prediction of a query whose candidates have these log-likelihoods."""
    order = np.argsort(-scores, kind="stable").tolist()
    true = {place for place, name in enumerate(candidates) if name in asked.query.answers}
    rank = next((n for n, place in enumerate(order) if place in true), len(order))
    kept = (
        order
        if len(order) <= ALL_KEPT
        else [place for n, place in enumerate(order) if n < RANKS_KEPT or place in true]
    )
    return asked.predict(
        candidates[order[0]],
        ranking=tuple((place, float(scores[place])) for place in kept),
        rank=rank,
    )
