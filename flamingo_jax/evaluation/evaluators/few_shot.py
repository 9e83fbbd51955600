"""The evaluator `few_shot`: a Flamingo's few-shot accuracy on a small set during training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation import prompts
from flamingo_jax.evaluation.datasets import DatasetReader, DrawnRecords
from flamingo_jax.evaluation.evaluator_config import EvaluatorConfig
from flamingo_jax.evaluation.evaluators.embedding import Parameters
from flamingo_jax.evaluation.examples import BenchmarkExample, read_examples
from flamingo_jax.evaluation.protocol.benchmark import Benchmark, EvaluationSettings
from flamingo_jax.evaluation.protocol.classification import Classification
from flamingo_jax.evaluation.protocol.open_ended import captioning, question_answering
from flamingo_jax.evaluation.selection.shots import draw
from flamingo_jax.experiment import Experiment
from flamingo_jax.inference.decoding import DecodingConfig
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.loading import LoadedFlamingo
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.pytrees import from_flat
from flamingo_jax.tasks import stages


class FewShot:
    """Runs a benchmark at each of `config.shots` (paper 3.1)."""

    def __init__(
        self,
        config: EvaluatorConfig,
        every: int,
        experiment: Experiment,
        tokenizer: Tokenizer,
        datasets: DatasetReader,
        mesh: Mesh,
    ):
        """Reads the examples.

        Raises: UserError for too few of them, or in a run of several processes.
        """
        if jax.process_count() > 1:
            raise UserError(
                "few-shot evaluation while a run of several processes trains is not there: take"
                " the evaluator out, and run launch.evaluate on a checkpoint"
            )
        self.every = every
        self._experiment, self._tokenizer, self._mesh = experiment, tokenizer, mesh
        self._batch_size = config.batch_size
        self._benchmark = _read(config, experiment, datasets)
        # A model trained on questions is asked as in its training, without text-only examples.
        text_examples = EvaluationSettings.text_examples
        if config.benchmark != "captioning" and _trained_prompts(experiment):
            text_examples = 0
        settings = EvaluationSettings(
            text_examples=text_examples,
            decoding=DecodingConfig(max_tokens=config.max_tokens, beam_size=config.beam_size),
            seed=experiment.seed,
        )
        self._settings = [dataclasses.replace(settings, shots=shots) for shots in config.shots]
        for setting in self._settings:
            self._benchmark.check(setting)
        model = nnx.eval_shape(
            lambda: stages.build_model(experiment, nnx.Rngs(params=jax.random.key(0)))
        )
        self._graph, _ = nnx.split(model)

    def compile(
        self, trainable: Parameters, frozen: Parameters
    ) -> Mapping[str, jax.stages.Compiled]:
        """Compiles nothing ahead: generation is compiled per prompt length, on first use."""
        return {}

    def __call__(self, trainable: Parameters, frozen: Parameters) -> dict[str, float]:
        """Runs the benchmark: {"accuracy@<shots>": 0 to 1}."""
        flamingo = self._experiment.flamingo
        assert flamingo is not None
        model: Any = nnx.merge(self._graph, nnx.State(from_flat({**trainable, **frozen})))
        engine = Engine(
            LoadedFlamingo(model, self._tokenizer, flamingo),
            with_visuals=self._experiment.training.use_visuals,
            batch_size=self._batch_size,
        )
        return {
            f"accuracy@{settings.shots}": self._benchmark.run(engine, settings).accuracy
            for settings in self._settings
        }


def _read(config: EvaluatorConfig, experiment: Experiment, datasets: DatasetReader) -> Benchmark:
    """Reads the benchmark that an evaluator's config describes."""
    kind = datasets.kind(config.path)
    if kind not in ("pairs", "videos", "questions"):
        raise UserError(
            f"the dataset {config.path} holds {kind}, but few-shot evaluation wants pairs, videos"
            " or questions"
        )

    def examples(split: str, limit: int) -> list[BenchmarkExample]:
        records = datasets.records(config.path, split, kind)
        places = draw(experiment.seed, f"{config.path}:{split}", len(records), limit)
        return read_examples(DrawnRecords(records, places), kind)

    queries = examples(config.split, config.limit)
    support = examples(config.support_split, config.support_limit)
    name = config.path
    if config.benchmark == "captioning":
        return captioning(name, queries, support)
    trained = _trained_prompts(experiment)
    questions = prompts.PromptTemplate(trained[0]) if len(trained) == 1 else prompts.QUESTION
    if config.benchmark == "vqa":
        return question_answering(name, queries, support, questions)
    answers = {example.answers[0] for example in (*queries, *support)}
    template = questions if any(query.question for query in queries) else prompts.CAPTION
    return Classification(name, queries, support, config.classes or sorted(answers), template)


def _trained_prompts(experiment: Experiment) -> list[str]:
    """Lists the distinct question prompts that the model is trained with."""
    return sorted({data.prompt for data in experiment.data.values() if data.kind == "questions"})
