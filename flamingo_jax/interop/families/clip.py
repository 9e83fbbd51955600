"""Reads CLIP's vision tower (Radford et al. 2021), from the complete model or saved alone."""

from flamingo_jax.experiment import VisionConfig
from flamingo_jax.interop.documents import Document
from flamingo_jax.interop.families.vision_tower import Defaults, parse_tower, tower_family

DEFAULTS = Defaults(
    patch_size=32,
    activation="quick_gelu",
    norm_eps=1e-5,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    fit="crop",
)


def parse(config: Document, preprocessor: Document) -> VisionConfig:
    """Translates CLIP's config.json and preprocessor_config.json."""
    return parse_tower(
        config,
        preprocessor,
        DEFAULTS,
        class_token=True,
        patch_bias=False,
        first_norm=True,
        last_norm=False,
    )


FAMILY = tower_family("clip", parse)
TOWER = tower_family("clip_vision_model", parse)
