"""The vision towers of CLIP and SigLIP as transformers publish them: their configs,
preprocessing and the tables of their tensors.
"""

import math

from flamingo_jax.checkpointing.tensors import Term
from flamingo_jax.experiment import VisionConfig, ViTConfig
from flamingo_jax.interop.documents import Document
from flamingo_jax.processing.images import Fit

FAMILIES = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
}
"""`model_type` -> family: the whole model, of which the tower is read, or the tower alone."""
ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "exact_gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
}
DEFAULTS: dict[str, dict[str, int]] = {"clip": {"patch_size": 32}, "siglip": {"patch_size": 16}}
"""What a config.json leaves out where it is as in transformers' own classes."""
FITS: dict[str, Fit] = {"clip": "crop", "siglip": "stretch"}
PIXELS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and deviation of a family's pixels where no preprocessor_config.json says them."""

LAYER = "vision_model.encoder.layers.{}."


def _both(ours: str, theirs: str) -> dict[str, tuple[Term, ...]]:
    return {
        f"{ours}/scale": (Term(f"{theirs}.weight"),),
        f"{ours}/bias": (Term(f"{theirs}.bias"),),
    }


def _attention(ours: str, theirs: str) -> dict[str, tuple[Term, ...]]:
    return {
        f"layers/attention/{ours}": (
            Term(f"{LAYER}self_attn.{theirs}.weight", "(h d) w -> w h d"),
        ),
        f"layers/attention/{ours}_bias": (Term(f"{LAYER}self_attn.{theirs}.bias", "(h d) -> h d"),),
    }


def table(config: VisionConfig) -> dict[str, tuple[Term, ...]]:
    """Our stacked names -> the tensors whose sum they are; {} stands for the layer's number.

    An encoder has those that its config asks for.
    """
    assert config.vit is not None
    patch, positions = (
        config.vit.patch_size,
        "vision_model.embeddings.position_embedding.weight",
    )
    return {
        # A convolution's weights; a patch here is rows, columns and colours.
        "patch_embedding": (
            Term(
                "vision_model.embeddings.patch_embedding.weight",
                "w c p q -> (p q c) w",
                {"c": 3, "p": patch, "q": patch},
            ),
        ),
        "patch_bias": (Term("vision_model.embeddings.patch_embedding.bias"),),
        # The class token's own position is the first, and part of the token here.
        "position_embedding": (
            Term(positions, "(r s) w -> r s w", first=1 if config.vit.class_token else 0),
        ),
        "class_embedding": (
            Term("vision_model.embeddings.class_embedding"),
            Term(positions, "n w -> (n w)", {"n": 1}, taken=1),
        ),
        **_both("first_norm", "vision_model.pre_layrnorm"),
        **_both("last_norm", "vision_model.post_layernorm"),
        **_both("layers/attention_norm", LAYER + "layer_norm1"),
        **_attention("query", "q_proj"),
        **_attention("key", "k_proj"),
        **_attention("value", "v_proj"),
        "layers/attention/out": (Term(LAYER + "self_attn.out_proj.weight", "w (h d) -> h d w"),),
        "layers/attention/out_bias": (Term(LAYER + "self_attn.out_proj.bias"),),
        **_both("layers/feed_forward_norm", LAYER + "layer_norm2"),
        "layers/feed_forward/up": (Term(LAYER + "mlp.fc1.weight", "f w -> w f"),),
        "layers/feed_forward/up_bias": (Term(LAYER + "mlp.fc1.bias"),),
        "layers/feed_forward/down": (Term(LAYER + "mlp.fc2.weight", "w f -> f w"),),
        "layers/feed_forward/down_bias": (Term(LAYER + "mlp.fc2.bias"),),
    }


PREFIX = "vision_model."
"""Is missing from all names where the tower was saved alone by transformers 5."""
HARMLESS = (
    r"text_model\..*",
    r"(text|visual)_projection\..*",
    r"logit_(scale|bias)",
    r"(.*\.)?position_ids",
    # CLIP's norm of the pooled vector and SigLIP's pooling head: grid features are taken before
    # them.
    r"vision_model\.head\..*",
)
HARMLESS_WITHOUT_LAST_NORM = (r"vision_model\.post_layernorm\..*",)


def parse(config: Document, preprocessor: Document) -> VisionConfig:
    """A config.json and a preprocessor_config.json (empty where there is none) as our config; a
    UserError for what the encoder here cannot do.
    """
    family = config.choice("model_type", FAMILIES, None)
    config.require("quantization_config")
    tower = config.inside("vision_config") if config.given("vision_config") is not None else config
    tower.require("num_channels", 3)
    clip = family == "clip"
    vit = ViTConfig(
        patch_size=tower.integer("patch_size", DEFAULTS[family]["patch_size"]),
        layers=tower.integer("num_hidden_layers", 12),
        width=tower.integer("hidden_size", 768),
        heads=tower.integer("num_attention_heads", 12),
        feed_forward=tower.integer("intermediate_size", 3072),
        activation=tower.choice(
            "hidden_act", ACTIVATIONS, "quick_gelu" if clip else "gelu_pytorch_tanh"
        ),
        class_token=clip,
        patch_bias=not clip,
        first_norm=clip,
        last_norm=not clip,
        norm_eps=tower.number("layer_norm_eps", 1e-5 if clip else 1e-6),
    )
    if vit.width % vit.heads:
        tower.refuse("hidden_size", f"a multiple of num_attention_heads ({vit.heads})")
    mean, std = _pixels(preprocessor, family)
    size = tower.integer("image_size", 224)
    return VisionConfig(
        image_size=size, mean=mean, std=std, image_fit=_fit(preprocessor, family), vit=vit
    )


def harmless(config: VisionConfig) -> tuple[str, ...]:
    """Regular expressions for the surplus tensors of such a model that are left unread."""
    assert config.vit is not None
    return HARMLESS + (() if config.vit.last_norm else HARMLESS_WITHOUT_LAST_NORM)


def _fit(given: Document, family: str) -> Fit:
    """How the folder's preprocessor makes an image a square: where it says nothing, as its
    family does.
    """
    size, crops = given.given("size"), given.given("do_center_crop")
    if isinstance(size, dict) and "height" in size:
        return "stretch"
    if crops or isinstance(size, int) or (isinstance(size, dict) and "shortest_edge" in size):
        # Without do_center_crop the rest would stay outside the square all the same.
        return "crop"
    return FITS[family]


def _pixels(given: Document, family: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if given.given("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    factor = given.number("rescale_factor", 1 / 255)
    if given.given("do_rescale") is False or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        given.refuse(
            "do_rescale" if given.given("do_rescale") is False else "rescale_factor", "1/255"
        )
    found = []
    for key, default in zip(("image_mean", "image_std"), PIXELS[family], strict=True):
        value = given.given(key)
        value = list(default) if value is None else value
        if (
            not isinstance(value, list)
            or len(value) != 3
            or not all(isinstance(number, int | float) for number in value)
        ):
            given.refuse(key, "three numbers")
        found.append(tuple(map(float, value)))
    return found[0], found[1]
