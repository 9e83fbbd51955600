"""Runs the evaluators of a training run on its checkpoint, for `launch.evaluate
--evaluator`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from data_pipelines.evaluation_data import PreparedDatasets
from data_pipelines.iterators import held_out_batches
from data_pipelines.readers import Readers
from flamingo_jax.configuring import did_you_mean
from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.evaluator_config import parse_evaluator
from flamingo_jax.evaluation.evaluators.factory import make_evaluator
from flamingo_jax.partitioning.host_shard import HostShard
from flamingo_jax.partitioning.mesh import check_batches
from flamingo_jax.paths import as_path
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.tasks import stages
from flamingo_jax.training import evaluator, held_out
from flamingo_jax.training.trained_run import TrainedRun, load_exported_run, load_trained_run


def measure(
    asked: Sequence[str],
    *,
    model: str = "",
    workdir: str = "",
    parts: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Runs evaluators on the export `model`, or on the newest checkpoint in `workdir`.

    parts: folders of frozen parts that the export does not contain, see `fj.load`.
    asked: names of evaluators in the run's config, or descriptions such as
      "kind=retrieval,path=data/photos".

    Returns: {<name>/<metric>: value}, as in the run's metrics.jsonl.
    Raises: UserError for a name that is not in the config, or an evaluator that cannot run.
    """
    folder = as_path(model or workdir)
    run = load_exported_run(folder, parts) if model else load_trained_run(folder)
    with jax.set_mesh(run.mesh):
        tokenizer = _tokenizer(run)
        evaluators = dict(_make(text, run, tokenizer) for text in asked)
        return evaluator.evaluate(evaluators, run.trainable, run.frozen)


def _tokenizer(run: TrainedRun) -> Tokenizer:
    config = stages.model_config(run.experiment)
    part = {"contrastive": "text", "flamingo": "language_model"}.get(run.experiment.task)
    size = (getattr(config, part) if part else config).vocab_size
    return Tokenizer.load(run.tokenizer_file, size)


def _make(text: str, run: TrainedRun, tokenizer: Tokenizer) -> tuple[str, Any]:
    experiment = run.experiment
    if text == held_out.NAME:
        check_batches(dataclasses.replace(experiment, data={}), run.mesh)
        batches = held_out_batches(
            experiment,
            tokenizer,
            host_shard=HostShard.of(run.mesh),
            readers=Readers(experiment.training.readers),
        )
        if not batches:
            raise UserError("the run's config has no held-out dataset: name another evaluator")
        task = stages.make_task(experiment)
        return text, held_out.HeldOutLosses(run.setup, task, batches, experiment, run.mesh)
    known = experiment.evaluators
    if "=" not in text and text not in known:
        raise UserError(
            f"the run's config has no evaluator {text!r}"
            f"{did_you_mean(text, [*known, held_out.NAME])}: describe it, as"
            " kind=retrieval,path=data/photos"
        )
    config = parse_evaluator(text) if "=" in text else known[text]
    name = config.kind if "=" in text else text
    return name, make_evaluator(name, config, experiment, tokenizer, PreparedDatasets(), run.mesh)
