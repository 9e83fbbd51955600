"""Reads SigLIP's vision tower (Zhai et al. 2023), from the complete model or saved alone."""

from flamingo_jax.experiment import VisionConfig
from flamingo_jax.interop.documents import Document
from flamingo_jax.interop.families.vision_tower import Defaults, parse_tower, tower_family

DEFAULTS = Defaults(
    patch_size=16,
    activation="gelu_pytorch_tanh",
    norm_eps=1e-6,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    fit="stretch",
)


def parse(config: Document, preprocessor: Document) -> VisionConfig:
    """Translates SigLIP's config.json and preprocessor_config.json."""
    return parse_tower(
        config,
        preprocessor,
        DEFAULTS,
        class_token=False,
        patch_bias=True,
        first_norm=False,
        last_norm=True,
    )


FAMILY = tower_family("siglip", parse)
TOWER = tower_family("siglip_vision_model", parse)
