"""Checks a run's tokenizer against its model and earlier checkpoints, before any work."""

import pathlib

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.processing.tokenizer import Tokenizer, tokenizer_file
from flamingo_jax.tasks import stages
from flamingo_jax.training.pretrained import open_frozen_sources


def check_tokenizer(experiment: Experiment, tokenizer: Tokenizer, workdir: pathlib.Path) -> None:
    """Raises UserError where the frozen language model, or the run in `workdir`, was trained
    with another tokenizer, even one with the same number of pieces.
    """
    sources = open_frozen_sources(experiment)
    # In the language modelling stage the frozen part is the whole model, whose name is "".
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
    """Loads the config's tokenizer.

    Raises: UserError where the model's vocabulary has another size than the tokenizer's, or
      than the tokenizer's padded to a multiple.
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
