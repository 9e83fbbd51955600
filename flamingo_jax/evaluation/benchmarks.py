"""Benchmarks: examples and a model to figures and samples (paper 3.1, facts 6)."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation import metrics, prompts
from flamingo_jax.evaluation.examples import Example, Page
from flamingo_jax.evaluation.shots import keyed_rng, make_shots
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.generation import DecodingConfig
from flamingo_jax.inference.prompts import Prompt, PromptPart, Visual
from flamingo_jax.progress import Bar

PAPER_DECODING = DecodingConfig(max_tokens=24, beam_size=3)
Judge = Callable[[str, Sequence[str]], float]
"""(prediction, right answers) -> how right it is, 0 to 1."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a benchmark is run.

    text_examples: text-only examples of open-ended zero-shot prompts.
    selection: of few-shot examples, "random" or "rices".
    """

    shots: int = 0
    text_examples: int = 2
    selection: str = "random"
    decoding: DecodingConfig = PAPER_DECODING
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Sample:
    """One query: what was shown and said, and how right it was (0 to 1)."""

    id: str
    prompt: str
    visual: Visual
    prediction: str
    answers: tuple[str, ...]
    right: float
    type: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
    """figures: {"accuracy": mean over samples, "accuracy/<type>" where examples have types, and
    "commonest_answer", what it is worth to give the commonest answer of the training split to
    everything, where that is known}, each 0 to 1.
    """

    name: str
    shots: int
    figures: dict[str, float]
    samples: list[Sample]

    @property
    def accuracy(self) -> float:
        return self.figures["accuracy"]


class Benchmark(Protocol):
    """Anything that a model can be run on."""

    @property
    def name(self) -> str: ...

    def check(self, settings: Settings) -> None:
        """Raises UserError where there is nothing to evaluate on, or too little support for the
        prompts.
        """

    def run(self, engine: Engine, settings: Settings) -> Result:
        """Raises UserError as `check` does."""


@dataclasses.dataclass(frozen=True)
class OpenEnded:
    """Answers written freely: captions and answers to questions. commonest: the answer that
    whoever does not look would give; "" for none.
    """

    name: str
    queries: Sequence[Example]
    support: Sequence[Example]
    form: prompts.Format
    judge: Judge
    commonest: str = ""

    def check(self, settings: Settings) -> None:
        _check_examples(self, settings, settings.text_examples)

    def run(self, engine: Engine, settings: Settings) -> Result:
        self.check(settings)
        shown = _few_shot_prompts(self, engine, settings, settings.text_examples)
        with Bar(_title(self.name, settings.shots), len(shown)) as bar:
            completions = engine.generate(
                shown, settings.decoding, seed=settings.seed, progress=bar.advance
            )
        samples = []
        for query, prompt, completion in zip(self.queries, shown, completions, strict=True):
            prediction = prompts.clean(completion.text)
            right = self.judge(prediction, query.answers)
            samples.append(
                Sample(
                    query.id,
                    as_text(prompt),
                    query.visual,
                    prediction,
                    query.answers,
                    right,
                    query.type,
                )
            )
        result = summarise(self.name, settings.shots, samples)
        if not self.commonest:
            return result
        guessed = float(
            np.mean([self.judge(self.commonest, query.answers) for query in self.queries])
        )
        return dataclasses.replace(result, figures=result.figures | {"commonest_answer": guessed})


def captioning(
    name: str,
    queries: Sequence[Example],
    support: Sequence[Example],
    judge: Judge = metrics.exact_match,
    form: prompts.Format = prompts.CAPTION,
) -> OpenEnded:
    """`<image>Output: ...`; by default a caption is right when it is one of the example's, word
    for word.
    """
    return OpenEnded(name, queries, support, form, judge)


def question_answering(
    name: str,
    queries: Sequence[Example],
    support: Sequence[Example],
    form: prompts.Format = prompts.QUESTION,
    commonest: str = "",
) -> OpenEnded:
    """`<image>Question: ... Answer: ...`, scored by VQA accuracy."""
    return OpenEnded(name, queries, support, form, metrics.vqa_accuracy, commonest)


def commonest_answer(answers: Iterable[Sequence[str]]) -> str:
    """The answer that most of the records give, the first of equals; "" where there is none."""
    counts = Counter(answer for some in answers for answer in some)
    return max(counts, key=counts.__getitem__, default="")


@dataclasses.dataclass(frozen=True)
class Classification:
    """The likeliest of the classes, by log-likelihood; zero-shot prompts have no text-only
    examples (facts 6.4).
    """

    name: str
    queries: Sequence[Example]
    support: Sequence[Example]
    classes: Sequence[str]
    form: prompts.Format = prompts.CAPTION

    def check(self, settings: Settings) -> None:
        _check_examples(self, settings, 0)

    def run(self, engine: Engine, settings: Settings) -> Result:
        self.check(settings)
        shown = _few_shot_prompts(self, engine, settings, 0)
        candidates = [[f" {name}" for name in self.classes]] * len(shown)
        with Bar(_title(self.name, settings.shots), len(shown)) as bar:
            scores = engine.log_likelihoods(shown, candidates, progress=bar.advance)
        samples = []
        for query, prompt, score in zip(self.queries, shown, scores, strict=True):
            prediction = self.classes[int(np.argmax(score))]
            right = metrics.exact_match(prediction, query.answers)
            samples.append(
                Sample(
                    query.id,
                    as_text(prompt),
                    query.visual,
                    prediction,
                    query.answers,
                    right,
                    query.type,
                )
            )
        return summarise(self.name, settings.shots, samples)


@dataclasses.dataclass(frozen=True)
class Binding:
    """Which of the page's new words names the last image, after `shots` images with their
    words; chance is one over the words.

    A page's texts end with the word that names its image.
    """

    name: str
    pages: Sequence[Page]

    def check(self, settings: Settings) -> None:
        self._long_enough(settings)

    def _long_enough(self, settings: Settings) -> list[Page]:
        pages = [page for page in self.pages if len(page.visuals) > settings.shots]
        if not pages:
            raise UserError(
                f"no page of {self.name} has {settings.shots} images before its last: ask for"
                " fewer shots"
            )
        return pages

    def run(self, engine: Engine, settings: Settings) -> Result:
        pages = self._long_enough(settings)
        shown = [prompts.binding(page, settings.shots) for page in pages]
        words = [
            sorted({prompts.split_last_word(text)[1] for text in page.texts[1:]}) for page in pages
        ]
        candidates = [[f" {word}" for word in some] for some in words]
        with Bar(_title(self.name, settings.shots), len(shown)) as bar:
            scores = engine.log_likelihoods(shown, candidates, progress=bar.advance)
        samples = []
        for page, prompt, some, score in zip(pages, shown, words, scores, strict=True):
            prediction, answer = (
                some[int(np.argmax(score))],
                prompts.split_last_word(page.texts[-1])[1],
            )
            samples.append(
                Sample(
                    page.id,
                    as_text(prompt),
                    page.visuals[-1],
                    prediction,
                    (answer,),
                    float(prediction == answer),
                )
            )
        return summarise(self.name, settings.shots, samples)


def summarise(name: str, shots: int, samples: list[Sample]) -> Result:
    """Means over all samples and over those of each type."""
    groups: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        groups["accuracy"].append(sample.right)
        if sample.type:
            groups[f"accuracy/{sample.type}"].append(sample.right)
    return Result(
        name,
        shots,
        {key: float(np.mean(values)) for key, values in sorted(groups.items())},
        samples,
    )


def as_text(prompt: Prompt) -> str:
    """A prompt as a person reads it, with its visuals as tags."""
    return "".join(
        part if isinstance(part, str) else "<image>" if isinstance(part, Visual) else part.value
        for part in prompt
    )


def _check_examples(
    benchmark: OpenEnded | Classification, settings: Settings, text_examples: int
) -> None:
    support, name = benchmark.support, benchmark.name
    if not benchmark.queries:
        raise UserError(
            f"{name} has no examples to evaluate on: name another split or a higher --limit"
        )
    need = max(settings.shots, 0 if settings.shots else text_examples)
    # A query is never its own example.
    known = {example.id for example in support} if settings.shots else set()
    left = len(support) - any(query.id in known for query in benchmark.queries)
    if left < need:
        own = ", besides the query itself" if left < len(support) else ""
        raise UserError(
            f"{name} needs {need} support examples for its prompts, but there are {left}{own}: "
            "ask for fewer shots or name a larger set"
        )


def _few_shot_prompts(
    benchmark: OpenEnded | Classification,
    engine: Engine,
    settings: Settings,
    text_examples: int,
) -> list[list[PromptPart]]:
    support, name = benchmark.support, benchmark.name
    # The same examples stand before every query of a zero-shot prompt.
    text_only: list[Example] = []
    if not settings.shots and text_examples:
        places = keyed_rng(settings.seed, name).permutation(len(support))[:text_examples]
        text_only = [support[place] for place in places]
    if not settings.shots:
        return [
            prompts.few_shot(query, [], text_only, benchmark.form) for query in benchmark.queries
        ]
    choose = make_shots(settings.selection, support, benchmark.queries, settings.seed, engine)
    return [
        prompts.few_shot(query, choose(query, settings.shots), [], benchmark.form)
        for query in benchmark.queries
    ]


def _title(name: str, shots: int) -> str:
    return f"{name}, {shots} shots" if shots else name
