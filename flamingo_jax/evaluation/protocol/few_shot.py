"""Few-shot prompts for benchmarks with a support set (paper 3.1)."""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation import prompts
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.media import MediaPool, Preprocessing
from flamingo_jax.evaluation.protocol.asking import Answer, Asked, ask_all
from flamingo_jax.evaluation.protocol.benchmark import EvaluationSettings, Prediction, title_of
from flamingo_jax.evaluation.protocol.journal import Journal
from flamingo_jax.evaluation.protocol.lengths import check_lengths
from flamingo_jax.evaluation.selection.shots import MediaEncoder, choose_shots, group_of, keyed_rng
from flamingo_jax.experiment import FlamingoConfig
from flamingo_jax.inference.device_model import most_tokens
from flamingo_jax.inference.engine import Engine
from flamingo_jax.paths import as_path
from flamingo_jax.processing.tokenizer import Tokenizer


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
    def text_examples(self, settings: EvaluationSettings) -> int:
        """Returns the number of text-only examples of a zero-shot prompt."""

    def further(self, settings: EvaluationSettings, tokenizer: Tokenizer) -> int:
        """Returns the number of tokens that may follow a prompt."""


def check_examples(benchmark: HasSupport, settings: EvaluationSettings) -> None:
    """Checks that there are queries, and enough support examples for their prompts.

    Raises: UserError that says how many support examples are needed.
    """
    support, name = benchmark.support, benchmark.name
    if not benchmark.queries:
        raise UserError(
            f"{name} has no examples to evaluate on: name another split or a higher --limit"
        )
    twice = [
        key for key, count in Counter(query.id for query in benchmark.queries).items() if count > 1
    ]
    if twice:
        raise UserError(
            f"{name} has {len(twice):,} ids of several queries, such as {twice[0]!r}: give each"
            " query an id of its own"
        )
    asked = [query for query in benchmark.queries if query.context is None]
    short = [query for query in benchmark.queries if query.context is not None]
    if short and (fewest := min(len(query.context or ()) for query in short)) < settings.shots:
        raise UserError(
            f"{name} gives each query its own shots, and no more than {fewest} to some: ask for"
            " fewer shots"
        )
    need = (
        max(settings.shots, 0 if settings.shots else benchmark.text_examples(settings))
        if asked
        else 0
    )
    # A query is never its own example, nor is one of its cluster.
    alike = Counter(group_of(example) for example in support) if settings.shots else Counter()
    left = len(support) - max((alike[group_of(query)] for query in asked), default=0)
    if left < need:
        own = ", besides the query itself" if left < len(support) else ""
        raise UserError(
            f"{name} needs {need} support examples for its prompts, but there are {left}{own}: "
            "ask for fewer shots or name a larger set"
        )


def ask_few_shot(
    benchmark: HasSupport,
    engine: Engine,
    settings: EvaluationSettings,
    answer: Answer,
    journal: Journal,
) -> tuple[list[Prediction], float]:
    """Writes every query's prompt and asks the model.

    Returns: (the predictions, seconds that the model waited for images and clips).
    Raises: UserError where a prompt does not fit in the model's context.
    """
    with MediaPool(Preprocessing.of(engine.config, settings.frames, settings.fps)) as pool:
        asked = few_shot_prompts(benchmark, MediaEncoder(engine, pool), settings)
        check_fits(benchmark, asked, settings, engine.config, engine.tokenizer)
        title = title_of(benchmark.name, settings.shots)
        predictions = ask_all(title, asked, answer, pool, journal, engine.batch_size)
    return predictions, pool.waited


def check_fits(
    benchmark: HasSupport,
    asked: Sequence[Asked],
    settings: EvaluationSettings,
    config: FlamingoConfig,
    tokenizer: Tokenizer,
) -> None:
    """Raises UserError where a prompt and what follows it do not fit in the model's context."""
    further = benchmark.further(settings, tokenizer)
    check_lengths(benchmark.name, asked, further, tokenizer, most_tokens(config))


def few_shot_prompts(
    benchmark: HasSupport,
    encoder: MediaEncoder | None,
    settings: EvaluationSettings,
) -> list[Asked]:
    """Writes each query's prompt: its shots, or text-only examples if it has none, then the query
    up to its answer. With `settings.permutations` > 1 it is written with its shots in as many
    random orders.
    """
    support, template = benchmark.support, benchmark.template
    if not settings.shots:
        # All zero-shot prompts start with the same text-only examples.
        order = keyed_rng(settings.seed, benchmark.name).permutation(len(support))
        text_only = [support[place] for place in order[: benchmark.text_examples(settings)]]
        return [
            Asked(query, (prompts.few_shot(query, [], text_only, template),), ())
            for query in benchmark.queries
        ]
    shown = _shots(benchmark, encoder, settings)
    return [
        _asked(query, shots, template, settings)
        for query, shots in zip(benchmark.queries, shown, strict=True)
    ]


def _shots(
    benchmark: HasSupport, encoder: MediaEncoder | None, settings: EvaluationSettings
) -> list[Sequence[BenchmarkExample]]:
    """Returns every query's shots: its own, or those chosen from the support set."""
    count, found = settings.shots, {}
    asked = [query for query in benchmark.queries if query.context is None]
    if asked:
        chosen = choose_shots(
            settings.selection,
            benchmark.support,
            asked,
            encoder,
            name=benchmark.name,
            seed=settings.seed,
            count=count,
            folder=as_path(settings.folder) if settings.folder else None,
        )
        found = {query.id: chosen.of(place, count) for place, query in enumerate(asked)}
    return [
        found[query.id] if query.context is None else query.context[len(query.context) - count :]
        for query in benchmark.queries
    ]


def _asked(
    query: BenchmarkExample,
    shots: Sequence[BenchmarkExample],
    template: prompts.PromptTemplate,
    settings: EvaluationSettings,
) -> Asked:
    """Writes a query's prompts; the images of its shots may be taken away."""
    orders = [list(shots)]
    if settings.permutations > 1 and len(shots) > 1:
        orders = []
        for number in range(settings.permutations):
            rng = keyed_rng(settings.seed, f"{query.id}/permutation {number}")
            orders.append([shots[place] for place in rng.permutation(len(shots))])
    written = tuple(
        prompts.few_shot(query, order, [], template)
        if settings.shot_images
        else prompts.few_shot(query, [], order, template)
        for order in orders
    )
    return Asked(query, written, tuple(shot.id for shot in shots))
