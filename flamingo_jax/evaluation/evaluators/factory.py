"""Makes the evaluators that `config.evaluators` declares; add a new kind to `KINDS`."""

from typing import Any

from jax.sharding import Mesh

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.datasets import DatasetReader
from flamingo_jax.evaluation.evaluator_config import EvaluatorConfig
from flamingo_jax.evaluation.evaluators.few_shot import FewShot
from flamingo_jax.evaluation.evaluators.retrieval import Retrieval
from flamingo_jax.evaluation.evaluators.zero_shot_classification import ZeroShotClassification
from flamingo_jax.experiment import Experiment
from flamingo_jax.processing.tokenizer import Tokenizer

KINDS: dict[str, tuple[str, Any]] = {
    "retrieval": ("contrastive", Retrieval),
    "zero_shot_classification": ("contrastive", ZeroShotClassification),
    "few_shot": ("flamingo", FewShot),
}
"""Kind -> (the task whose models it evaluates, its class)."""


def make_evaluators(
    experiment: Experiment, tokenizer: Tokenizer, datasets: DatasetReader, mesh: Mesh
) -> dict[str, Any]:
    """Makes the evaluators of `config.evaluators`: {name: `training.evaluator.Evaluator`}.

    Each opens its dataset and checks its records now, so that mistakes show before training.

    Raises: UserError, with the evaluator's config key, for one that cannot run.
    """
    return {
        name: make_evaluator(name, config, experiment, tokenizer, datasets, mesh)
        for name, config in experiment.evaluators.items()
    }


def make_evaluator(
    name: str,
    config: EvaluatorConfig,
    experiment: Experiment,
    tokenizer: Tokenizer,
    datasets: DatasetReader,
    mesh: Mesh,
) -> Any:
    """Makes one evaluator; see `make_evaluators`."""
    place = f"config.evaluators.{name}"
    task, evaluator = KINDS[config.kind]
    if experiment.task != task:
        raise UserError(
            f"{place}.kind is {config.kind!r}, which measures the model of task {task!r}, but"
            f" this one is {experiment.task!r}: take it out"
        )
    if not config.path:
        raise UserError(f"{place}.path is empty: name the folder of a dataset")
    every = config.every or experiment.training.evaluate_every
    try:
        return evaluator(config, every, experiment, tokenizer, datasets, mesh)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
