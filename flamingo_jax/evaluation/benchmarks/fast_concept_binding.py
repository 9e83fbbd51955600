"""Fast concept binding (Tsimpoukelli et al. 2021): the prompt teaches made-up words for what
its images show, so that only in-context learning can answer.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation import prompts
from flamingo_jax.evaluation.benchmarks.benchmark import (
    BenchmarkResult,
    EvaluationSettings,
    Prediction,
    as_text,
    summarise,
    title_of,
)
from flamingo_jax.evaluation.examples import InterleavedPage
from flamingo_jax.inference.engine import Engine
from flamingo_jax.progress import Bar


@dataclasses.dataclass(frozen=True)
class FastConceptBinding:
    """Predicts which of a page's made-up words names its last image, given the `shots` images
    before it with their words. Chance is 1 / number of words.

    pages: each text after an image ends with the word for that image.
    """

    name: str
    pages: Sequence[InterleavedPage]

    def check(self, settings: EvaluationSettings) -> None:
        """Raises UserError where no page has `shots` images before its last one."""
        self._long_enough(settings)

    def _long_enough(self, settings: EvaluationSettings) -> list[InterleavedPage]:
        """Returns the pages with at least `shots` images before the query image."""
        pages = [page for page in self.pages if len(page.visuals) > settings.shots]
        if not pages:
            raise UserError(
                f"no page of {self.name} has {settings.shots} images before its last: ask for"
                " fewer shots"
            )
        return pages

    def run(self, engine: Engine, settings: EvaluationSettings) -> BenchmarkResult:
        """Scores the words of every page that has enough images; shorter pages are skipped."""
        pages = self._long_enough(settings)
        asked = [prompts.concept_binding(page, settings.shots) for page in pages]
        # The candidates are the words of the whole page, whichever of them the shots show.
        words = [
            sorted({prompts.split_last_word(text)[1] for text in page.texts[1:]}) for page in pages
        ]
        candidates = [[f" {word}" for word in some] for some in words]
        with Bar(title_of(self.name, settings.shots), len(asked)) as bar:
            rankings = engine.log_likelihoods(asked, candidates, progress=bar.advance)
        predictions = []
        for page, prompt, some, ranking in zip(pages, asked, words, rankings, strict=True):
            text = some[int(np.argmax(ranking))]
            answer = prompts.split_last_word(page.texts[-1])[1]
            predictions.append(
                Prediction(
                    page.id,
                    as_text(prompt),
                    page.visuals[-1],
                    text,
                    (answer,),
                    float(text == answer),
                )
            )
        return summarise(self.name, settings.shots, predictions)
