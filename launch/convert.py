"""Turns a published model's folder into an export, or compares what is read from it with its
original implementation.

    python -m launch.convert --language_model=models/Qwen3-0.6B --output=exports/qwen3
    [--verify] python -m launch.convert --vision_encoder=models/siglip-base-patch16-224
    --output=exports/siglip [--verify]

Folders are as Hugging Face's transformers save them: config.json, safetensors (one file, or
several and their index) and, of a language model, tokenizer.json or tokenizer.model. Llama,
Mistral, Qwen2 and Qwen3 language models are read, and the vision towers of CLIP and SigLIP. The
export keeps every value as it is stored; tensors pass through the host one at a time. Training
also takes the folder itself, without an export.

--verify runs both implementations in float32 and prints the largest relative error and the KL
divergence; it needs transformers and torch (pip install 'flamingo_jax[interop-test]') and
memory for the model twice.
"""

import logging
import math
import pathlib
from collections.abc import Iterator

import numpy as np
from absl import flags

from flamingo_jax.checkpointing.export import export_model
from flamingo_jax.configuring import to_json
from flamingo_jax.errors import UserError
from flamingo_jax.interop.folders import Foreign, Part, open_folder
from flamingo_jax.interop.verify import (
    require_original,
    verify_language_model,
    verify_vision_encoder,
)
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.progress import Bar
from launch import command

log = logging.getLogger("launch")

LANGUAGE_MODEL = flags.DEFINE_string("language_model", "", "Folder of a published language model.")
VISION_ENCODER = flags.DEFINE_string("vision_encoder", "", "Folder of a published CLIP or SigLIP.")
OUTPUT = flags.DEFINE_string("output", "", "Folder to write the export to; must not be there yet.")
VERIFY = flags.DEFINE_bool(
    "verify", False, "Compare with the original implementation, which must be installed."
)

SHARD_BYTES = 500_000_000
"""Of each file of the export. While one is written the host holds it twice."""
DIFFERENT = 1e-3
"""A relative error above this is no rounding."""


def main() -> int:
    if bool(LANGUAGE_MODEL.value) == bool(VISION_ENCODER.value):
        raise UserError(
            "name the folder of one model: --language_model=FOLDER or --vision_encoder=FOLDER"
        )
    if not OUTPUT.value and not VERIFY.value:
        raise UserError("nothing to do: add --output=FOLDER, --verify or both")
    part: Part = "language_model" if LANGUAGE_MODEL.value else "vision_encoder"
    folder = LANGUAGE_MODEL.value or VISION_ENCODER.value
    if VERIFY.value:
        require_original()
    found = open_folder(folder, part)
    if part == "language_model" and OUTPUT.value:
        if found.tokenizer_file is None:
            raise UserError(
                f"{folder} holds no tokenizer.json or tokenizer.model, which its export needs:"
                " copy it there"
            )
        Tokenizer.load(found.tokenizer_file, found.config.vocab_size)
    if OUTPUT.value:
        export_model(
            pathlib.Path(OUTPUT.value),
            kind=part,
            config=to_json(found.config),
            parameters=_shown(found),
            tokenizer_file=found.tokenizer_file,
            extra_files={"original_config.json": pathlib.Path(folder) / "config.json"},
            shard_bytes=SHARD_BYTES,
        )
        log.info("wrote the %s of %s to %s", part.replace("_", " "), folder, OUTPUT.value)
    if VERIFY.value:
        compared = (
            verify_language_model(folder)
            if part == "language_model"
            else verify_vision_encoder(folder)
        )
        print(
            f"largest relative error {compared.relative_error:.2e} of {compared.values:,}"
            f" {'features' if compared.divergence is None else 'logits'}"
        )
        if compared.divergence is not None:
            print(f"KL divergence {compared.divergence:.2e} nats a token")
        if not compared.relative_error <= DIFFERENT:
            raise UserError(
                f"{folder} does not give here what its original gives: do not use it, and"
                " report its config.json"
            )
    return 0


def _shown(found: Foreign) -> Iterator[tuple[str, np.ndarray]]:
    with Bar(
        f"converting {found.folder.name}",
        sum(math.prod(shape) for shape in found.shapes.values()) // 10**6,
    ) as bar:
        done = 0
        for name, array in found.layers():
            yield name, array
            before, done = done, done + array.size
            bar.advance(done // 10**6 - before // 10**6, "million parameters")


if __name__ == "__main__":
    command.run(main)
