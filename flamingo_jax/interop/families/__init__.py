"""Lists the families of published models, one file each. `family.Family` says how to add
one.
"""

from typing import Any

from flamingo_jax.interop.documents import Document
from flamingo_jax.interop.families import (
    clip,
    gpt_neox,
    llama,
    mistral,
    mpt,
    opt,
    qwen2,
    qwen3,
    siglip,
)
from flamingo_jax.interop.families.family import Family, ModelPart

FAMILIES: dict[ModelPart, dict[str, Family]] = {
    "language_model": {
        family.model_type: family
        for family in (
            llama.FAMILY,
            mistral.FAMILY,
            qwen2.FAMILY,
            qwen3.FAMILY,
            gpt_neox.FAMILY,
            mpt.FAMILY,
            opt.FAMILY,
        )
    },
    "vision_encoder": {
        family.model_type: family
        for family in (clip.FAMILY, clip.TOWER, siglip.FAMILY, siglip.TOWER)
    },
}
"""{part of a Flamingo: {`model_type` in config.json: family}}."""


def family_of(config: Document, part: ModelPart) -> Family:
    """Returns the family of a config.json by its `model_type`.

    Raises: UserError, with the known families, for an unknown one.
    """
    return config.choice("model_type", FAMILIES[part], None)


def parse(config: Document, preprocessor: Document, part: ModelPart) -> Any:
    """Translates a config.json into a LanguageModelConfig or VisionConfig.

    Raises: UserError for a setting that the models here do not support.
    """
    return family_of(config, part).parse(config, preprocessor)
