"""Converts the folder of a published model to an export, or compares it with its original."""

import logging
import pathlib

from flamingo_jax.checkpointing.export import export_model
from flamingo_jax.checkpointing.model_card import (
    LOAD_PART,
    ModelCard,
    count_parameters,
    describe_part,
    render,
)
from flamingo_jax.checkpointing.streaming import HashingReader, TensorStream
from flamingo_jax.configuring import to_json
from flamingo_jax.errors import UserError
from flamingo_jax.interop.folders import ModelPart, PublishedFolder, open_folder
from flamingo_jax.interop.verify import (
    Comparison,
    verify_language_model,
    verify_vision_encoder,
)
from flamingo_jax.interop.weight_sources import declare
from flamingo_jax.processing.tokenizer import Tokenizer

log = logging.getLogger(__name__)

DIFFERENT = 1e-3
"""A relative error above this is more than rounding."""


def convert(folder: pathlib.Path, part: ModelPart, output: pathlib.Path) -> None:
    """Converts the folder of a published model to an export, tensor by tensor, without
    changing dtypes.

    Raises: UserError for a path that is not a folder, a tensor that is missing, unexpected or
      of the wrong shape, a language model without its tokenizer, or an `output` that exists.
    """
    found = open_folder(folder, part)
    if part == "language_model":
        if found.tokenizer_file is None:
            raise UserError(
                f"{folder} holds no tokenizer.json or tokenizer.model, which its export needs:"
                " copy it there"
            )
        Tokenizer.load(found.tokenizer_file, found.config.vocab_size)
    stamp = found.stamp()

    def check(reader: HashingReader) -> None:
        if found.stamp() != stamp:
            raise UserError(f"{folder} changed while it was converted: convert it again")

    export_model(
        output,
        kind=part,
        config=to_json(found.config),
        parameters=TensorStream(found.stream(declare(found)), stamp, check),
        tokenizer_file=found.tokenizer_file,
        extra_files={"original_config.json": folder / "config.json"},
        card=_card(found, folder),
    )
    log.info("wrote the %s of %s to %s", part.replace("_", " "), folder, output)


def compare(folder: pathlib.Path, part: ModelPart) -> Comparison:
    """Runs a published model here and in transformers, both in float32, and compares
    outputs.
    """
    verify = verify_language_model if part == "language_model" else verify_vision_encoder
    return verify(folder)


def require_equal(comparison: Comparison, folder: pathlib.Path) -> None:
    """Raises UserError if a comparison shows more than rounding."""
    if not comparison.relative_error <= DIFFERENT:
        raise UserError(
            f"{folder} does not give here what its original gives: do not use it, and"
            " report its config.json"
        )


def _card(found: PublishedFolder, folder: pathlib.Path) -> str:
    """Writes the model card of a converted model."""
    name = found.part.replace("_", " ")
    return render(
        ModelCard(
            f"The {name} {folder.name}",
            f"A published {name} in the format of flamingo_jax, its values as they were.",
            parameters={found.part: count_parameters(found.shapes)},
            parts=(describe_part(found.part, folder),),
            loading=LOAD_PART.format(part=found.part),
        )
    )
