"""Fast concept binding (Tsimpoukelli et al. 2021): the prompt teaches made-up words for what
its images show, so that only in-context learning can answer.
"""

import dataclasses
from collections.abc import Sequence

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation import prompts
from flamingo_jax.evaluation.examples import BenchmarkExample, InterleavedPage
from flamingo_jax.evaluation.media import MediaPool, Preprocessing
from flamingo_jax.evaluation.protocol.asking import Asked, ask_all
from flamingo_jax.evaluation.protocol.benchmark import (
    BenchmarkResult,
    EvaluationSettings,
    Prediction,
    summarise,
    title_of,
)
from flamingo_jax.evaluation.protocol.classification import ranked
from flamingo_jax.evaluation.protocol.journal import NOT_KEPT, Journal
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.prompts import Prompt


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
        pages = [page for page in self.pages if len(page.media) > settings.shots]
        if not pages:
            raise UserError(
                f"no page of {self.name} has {settings.shots} images before its last: ask for"
                " fewer shots"
            )
        return pages

    def run(
        self, engine: Engine, settings: EvaluationSettings, journal: Journal = NOT_KEPT
    ) -> BenchmarkResult:
        """Scores the words of every page that has enough images; shorter pages are skipped."""
        asked = [_asked(page, settings) for page in self._long_enough(settings)]

        def answer(asked: Sequence[Asked], orders: list[list[Prompt]]) -> list[Prediction]:
            words = [one.query.candidates for one in asked]
            candidates = [[f" {word}" for word in some] for some in words]
            return list(map(ranked, asked, words, engine.log_likelihoods(orders[0], candidates)))

        with MediaPool(Preprocessing.of(engine.config)) as pool:
            title = title_of(self.name, settings.shots)
            predictions = ask_all(title, asked, answer, pool, journal, engine.batch_size)
        predictions = [
            dataclasses.replace(one, score=float(one.text in one.answers)) for one in predictions
        ]
        return summarise(self.name, settings.shots, predictions, pool.waited)


def _asked(page: InterleavedPage, settings: EvaluationSettings) -> Asked:
    # The candidates are the words of the whole page, whichever of them the shots show.
    words = sorted({prompts.split_last_word(text)[1] for text in page.texts[1:]})
    query = BenchmarkExample(
        page.id,
        page.media[-1],
        (prompts.split_last_word(page.texts[-1])[1],),
        candidates=tuple(words),
    )
    prompt = prompts.concept_binding(page, settings.shots, shot_images=settings.shot_images)
    return Asked(query, (prompt,), ())
