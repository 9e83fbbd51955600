"""Published families, one file each: see `family.Family` for how to add one."""

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
"""By part and `model_type`."""


def family_of(config: Document, part: ModelPart) -> Family:
    """The family of a config.json.

    Raises: UserError for one that is not known, with those that are.
    """
    return config.choice("model_type", FAMILIES[part], None)


def parse(config: Document, preprocessor: Document, part: ModelPart) -> Any:
    """A config.json as LanguageModelConfig or VisionConfig.

    Raises: UserError for what cannot be honoured.
    """
    return family_of(config, part).parse(config, preprocessor)
