"""Trains one stage, or goes on with it where it stopped.

    python -m launch.train --config=configs/quickstart.py:flamingo --workdir=runs/quickstart/flamingo [--config.training.steps=2000 ...]

With --prepare everything before the first step is done and nothing is trained: the config is checked, rows are planned, and the features of
a frozen encoder are made where the config keeps them, for which no language model need be there yet.

Everything is checked before work starts; bad input is one sentence and exit code 2. SIGTERM saves and exits with code 75: the same
command goes on from there. A run whose steps are not finite stops with code 3, one that ends above a required loss with code 4.
"""

import logging
import pathlib

from absl import flags

from data_pipelines.inputs import held_out_batches, make_iterators
from flamingo_jax import errors
from flamingo_jax.experiment import Experiment
from flamingo_jax.partitioning.mesh import check_batches, make_mesh
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.tasks import stages
from flamingo_jax.training.assembly import load_encoder
from flamingo_jax.training.loop import train
from launch import command

log = logging.getLogger("launch")

WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and the config; made if it is not there.")
PREPARE = flags.DEFINE_boolean("prepare", False, "Check the config and make what training reads, but do not train.")
CONFIG = command.define_config()


def main() -> int:
    experiment = command.experiment(CONFIG)
    if not WORKDIR.value:
        raise errors.UserError("--workdir is not set: name a folder for checkpoints and metrics")
    workdir = pathlib.Path(WORKDIR.value)
    check_batches(experiment, make_mesh(experiment.mesh))
    if not PREPARE.value:
        stages.bases(experiment)
    tokenizer = Tokenizer.load(experiment.tokenizer)
    check_vocabulary(experiment, tokenizer)
    encoder = load_encoder(experiment) if experiment.training.cache_features else None
    iterators = make_iterators(experiment, tokenizer, encoder)
    held_out = held_out_batches(experiment, tokenizer, encoder)
    if PREPARE.value:
        for iterator in iterators.values():
            iterator.close()
        log.info("all is prepared: the same command without --prepare trains")
        return 0

    def on_start() -> None:
        # Not before: a config that is refused must not replace the one of the run that is there.
        workdir.mkdir(parents=True, exist_ok=True)
        command.write_config(experiment, workdir / "config.json")
        tokenizer.save(workdir)

    outcome = train(experiment, iterators, held_out, workdir, on_start)
    if outcome.preempted:
        log.warning("stopped by a signal at step %d and saved: run the same command to go on", outcome.step)
        return errors.EXIT_PREEMPTED
    return 0


def check_vocabulary(experiment: Experiment, tokenizer: Tokenizer) -> None:
    """A UserError where the model's vocabulary is not the tokenizer's."""
    config = stages.model_config(experiment)
    part = {"contrastive": "text", "flamingo": "language_model"}.get(experiment.task)
    size = (getattr(config, part) if part else config).vocab_size
    if size != tokenizer.vocab_size:
        key = ".".join(["config", stages.MODEL_FIELD[experiment.task], *([part] if part else []), "vocab_size"])
        raise errors.UserError(f"{key} is {size}, but the tokenizer {experiment.tokenizer} has {tokenizer.vocab_size} pieces: make them equal")


if __name__ == "__main__":
    command.run(main)
