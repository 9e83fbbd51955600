r"""Converts the folder of a published model to an export, or compares the model here with its
original implementation.

    python -m launch.convert --language_model=models/Qwen3-0.6B --output=exports/qwen3
    [--verify] python -m launch.convert --vision_encoder=models/siglip-base-patch16-224 \
        --output=exports/siglip [--verify]

The folder is one that Hugging Face's transformers save: config.json, safetensors (one file, or
several with an index) and, for a language model, tokenizer.json or tokenizer.model. Supported
are the families in flamingo_jax/interop/families, among them the vision towers of CLIP and
SigLIP. The export keeps every value as it is stored; only one tensor at a time is in memory.
Training can also read the folder itself, without an export.

--verify runs both implementations in float32 and prints the largest relative error and the KL
divergence; it needs transformers and torch (pip install 'flamingo_jax[interop-test]') and
memory for the model twice.
"""

from absl import flags

from flamingo_jax.errors import UserError
from flamingo_jax.paths import as_path
from launch import command

LANGUAGE_MODEL = flags.DEFINE_string("language_model", "", "Folder of a published language model.")
VISION_ENCODER = flags.DEFINE_string("vision_encoder", "", "Folder of a published CLIP or SigLIP.")
OUTPUT = flags.DEFINE_string("output", "", "Folder to write the export to; must not be there yet.")
VERIFY = flags.DEFINE_bool(
    "verify", False, "Compare with the original implementation, which must be installed."
)


def main() -> int:
    if bool(LANGUAGE_MODEL.value) == bool(VISION_ENCODER.value):
        raise UserError(
            "name the folder of one model: --language_model=FOLDER or --vision_encoder=FOLDER"
        )
    if not OUTPUT.value and not VERIFY.value:
        raise UserError("nothing to do: add --output=FOLDER, --verify or both")
    from flamingo_jax.interop.convert import compare, convert, require_equal
    from flamingo_jax.interop.folders import ModelPart, open_folder
    from flamingo_jax.interop.verify import require_original

    part: ModelPart = "language_model" if LANGUAGE_MODEL.value else "vision_encoder"
    folder = as_path(LANGUAGE_MODEL.value or VISION_ENCODER.value)
    if VERIFY.value:
        require_original()
        open_folder(folder, part)
    if OUTPUT.value:
        convert(folder, part, as_path(OUTPUT.value))
    if VERIFY.value:
        compared = compare(folder, part)
        print(
            f"largest relative error {compared.relative_error:.2e} of {compared.values:,}"
            f" {'features' if compared.divergence is None else 'logits'}"
        )
        if compared.divergence is not None:
            print(f"KL divergence {compared.divergence:.2e} nats a token")
        require_equal(compared, folder)
    return 0


if __name__ == "__main__":
    command.run(main)
