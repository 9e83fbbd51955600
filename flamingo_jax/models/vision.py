"""The vision encoder that a config asks for."""

from flax import nnx

from flamingo_jax.experiment import VisionConfig
from flamingo_jax.models.nfnet import NFNet
from flamingo_jax.models.vit import ViT

VisionEncoder = NFNet | ViT


def vision_encoder(config: VisionConfig, *, rngs: nnx.Rngs) -> VisionEncoder:
    """Both map normalised images [M, H, W, 3] to grid features [M, h, w, C], C being their
    `width`, and h = w = `grid` for images of the config's size.
    """
    return NFNet(config, rngs=rngs) if config.vit is None else ViT(config, rngs=rngs)
