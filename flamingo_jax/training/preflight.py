"""What a run checks about its tokenizer before any work."""

import pathlib

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.processing.tokenizer import Tokenizer, tokenizer_file
from flamingo_jax.tasks import stages
from flamingo_jax.training.pretrained import open_frozen_sources


def check_tokenizer(experiment: Experiment, tokenizer: Tokenizer, workdir: pathlib.Path) -> None:
    """A UserError where the frozen language model, or the run in `workdir`, was trained on
    another tokenizer, however many pieces it has.
    """
    sources = open_frozen_sources(experiment)
    # A language model that is all of the model has no name in it.
    texts = [source for name, source in sources.items() if name in ("language_model", "")]
    frozen = texts[0].tokenizer_file if texts else None
    earlier = tokenizer_file(workdir) if any((workdir / "checkpoints").glob("*")) else None
    for file in (frozen, earlier):
        if (
            file is not None
            and file.is_file()
            and Tokenizer.load(file).fingerprint != tokenizer.fingerprint
        ):
            raise UserError(
                f"the tokenizer {experiment.tokenizer} is not {file}, which was trained with:"
                " name that one in config.tokenizer"
            )


def load_tokenizer(experiment: Experiment) -> Tokenizer:
    """The config's tokenizer; a UserError where the model's vocabulary is not its own, padded
    to some multiple or not.
    """
    tokenizer = Tokenizer.load(experiment.tokenizer)
    config = stages.model_config(experiment)
    part = {"contrastive": "text", "flamingo": "language_model"}.get(experiment.task)
    size = (getattr(config, part) if part else config).vocab_size
    if not tokenizer.fits(size):
        key = ".".join(
            [
                "config",
                stages.MODEL_FIELD[experiment.task],
                *([part] if part else []),
                "vocab_size",
            ]
        )
        raise UserError(
            f"{key} is {size}, but the tokenizer {experiment.tokenizer} has {tokenizer.pieces}"
            " pieces: make them equal"
        )
    return Tokenizer.load(experiment.tokenizer, size)
