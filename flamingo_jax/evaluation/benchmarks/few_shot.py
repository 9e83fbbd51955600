"""Few-shot prompts for benchmarks with a support set (paper 3.1)."""

from collections.abc import Sequence
from typing import Protocol

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation import prompts
from flamingo_jax.evaluation.benchmarks.benchmark import EvaluationSettings, Prediction, as_text
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.selection.shots import choose_shots, keyed_rng
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.prompts import PromptPart
from flamingo_jax.paths import as_path


class HasSupport(Protocol):
    """A benchmark that chooses shots for its queries from a support set."""

    @property
    def name(self) -> str: ...
    @property
    def queries(self) -> Sequence[BenchmarkExample]: ...
    @property
    def support(self) -> Sequence[BenchmarkExample]: ...
    @property
    def template(self) -> prompts.PromptTemplate: ...


def check_examples(benchmark: HasSupport, settings: EvaluationSettings, text_examples: int) -> None:
    """Checks that there are queries, and enough support examples for their prompts.

    text_examples: number of text-only examples of a zero-shot prompt.
    Raises: UserError that says how many support examples are needed.
    """
    support, name = benchmark.support, benchmark.name
    if not benchmark.queries:
        raise UserError(
            f"{name} has no examples to evaluate on: name another split or a higher --limit"
        )
    need = max(settings.shots, 0 if settings.shots else text_examples)
    # A query is never its own example.
    ids = {example.id for example in support} if settings.shots else set()
    left = len(support) - any(query.id in ids for query in benchmark.queries)
    if left < need:
        own = ", besides the query itself" if left < len(support) else ""
        raise UserError(
            f"{name} needs {need} support examples for its prompts, but there are {left}{own}: "
            "ask for fewer shots or name a larger set"
        )


def few_shot_prompts(
    benchmark: HasSupport, engine: Engine, settings: EvaluationSettings, text_examples: int
) -> list[list[PromptPart]]:
    """Writes each query's prompt: its shots, or `text_examples` text-only examples if it has
    none, then the query up to its answer.
    """
    support, template = benchmark.support, benchmark.template
    if settings.shots:
        return _written(benchmark, settings, _chosen(benchmark, engine, settings))
    # All zero-shot prompts start with the same text-only examples.
    order = keyed_rng(settings.seed, benchmark.name).permutation(len(support))
    text_only = [support[place] for place in order[:text_examples]]
    return [prompts.few_shot(query, [], text_only, template) for query in benchmark.queries]


def permuted_prompts(
    benchmark: HasSupport, engine: Engine, settings: EvaluationSettings
) -> list[list[list[PromptPart]]]:
    """Writes each query's prompt with its shots in `settings.permutations` random orders: for
    each order the prompts of all queries.
    """
    chosen = _chosen(benchmark, engine, settings)

    def permuted(number: int) -> list[list[BenchmarkExample]]:
        found = []
        for query, shots in zip(benchmark.queries, chosen, strict=True):
            rng = keyed_rng(settings.seed, f"{query.id}/permutation {number}")
            found.append([shots[shot] for shot in rng.permutation(len(shots))])
        return found

    numbers = range(settings.permutations)
    return [_written(benchmark, settings, permuted(number)) for number in numbers]


def _chosen(
    benchmark: HasSupport, engine: Engine, settings: EvaluationSettings
) -> list[list[BenchmarkExample]]:
    """Chooses every query's shots."""
    chosen = choose_shots(
        settings.selection,
        benchmark.support,
        benchmark.queries,
        engine,
        name=benchmark.name,
        seed=settings.seed,
        count=settings.shots,
        folder=as_path(settings.folder) if settings.folder else None,
    )
    return [chosen.of(place, settings.shots) for place in range(len(benchmark.queries))]


def _written(
    benchmark: HasSupport, settings: EvaluationSettings, chosen: Sequence[list[BenchmarkExample]]
) -> list[list[PromptPart]]:
    """Writes every query's prompt with its shots, whose images may be taken away."""
    written = []
    for query, shots in zip(benchmark.queries, chosen, strict=True):
        with_images, texts = (shots, []) if settings.shot_images else ([], shots)
        written.append(prompts.few_shot(query, with_images, texts, benchmark.template))
    return written


def prediction_of(
    query: BenchmarkExample, prompt: Sequence[PromptPart], text: str, score: float
) -> Prediction:
    """Combines a query, its prompt and the model's answer into a Prediction."""
    return Prediction(
        query.id, as_text(prompt), query.visual, text, query.answers, score, query.question_type
    )
