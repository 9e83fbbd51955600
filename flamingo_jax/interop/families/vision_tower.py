"""Reads what the vision towers of CLIP and SigLIP have in common: the names of their tensors,
their configs and preprocessing, in transformers' format.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from flamingo_jax.checkpointing.stored_tensors import Term
from flamingo_jax.experiment import VisionConfig, ViTConfig
from flamingo_jax.interop.documents import Document
from flamingo_jax.interop.families.family import Family, TensorTable, attention, norm
from flamingo_jax.processing.images import Fit

ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "exact_gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
}


class Defaults(NamedTuple):
    """Defaults of transformers' classes for keys that config.json lacks. mean, std (of pixels
    from 0 to 1) and fit are for folders without a preprocessor_config.json.
    """

    patch_size: int
    activation: str
    norm_eps: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Fit


LAYER = "vision_model.encoder.layers.{}."


def table(config: VisionConfig) -> TensorTable:
    """Returns the table of tensors of an encoder with this config."""
    assert config.vit is not None
    patch, positions = (
        config.vit.patch_size,
        "vision_model.embeddings.position_embedding.weight",
    )
    return {
        # The weights of a convolution; here a patch is flattened as (rows, columns, colours).
        "patch_embedding": (
            Term(
                "vision_model.embeddings.patch_embedding.weight",
                "w c p q -> (p q c) w",
                {"c": 3, "p": patch, "q": patch},
            ),
        ),
        "patch_bias": (Term("vision_model.embeddings.patch_embedding.bias"),),
        # The first position is that of the class token, whose embedding includes it here.
        "position_embedding": (
            Term(positions, "(r s) w -> r s w", first=1 if config.vit.class_token else 0),
        ),
        "class_embedding": (
            Term("vision_model.embeddings.class_embedding"),
            Term(positions, "n w -> (n w)", {"n": 1}, taken=1),
        ),
        **norm("first_norm", "vision_model.pre_layrnorm"),
        **norm("last_norm", "vision_model.post_layernorm"),
        **norm("layers/attention_norm", LAYER + "layer_norm1"),
        **attention("query", LAYER + "self_attn.q_proj"),
        **attention("key", LAYER + "self_attn.k_proj"),
        **attention("value", LAYER + "self_attn.v_proj"),
        "layers/attention/out": (Term(LAYER + "self_attn.out_proj.weight", "w (h d) -> h d w"),),
        "layers/attention/out_bias": (Term(LAYER + "self_attn.out_proj.bias"),),
        **norm("layers/feed_forward_norm", LAYER + "layer_norm2"),
        "layers/feed_forward/up": (Term(LAYER + "mlp.fc1.weight", "f w -> w f"),),
        "layers/feed_forward/up_bias": (Term(LAYER + "mlp.fc1.bias"),),
        "layers/feed_forward/down": (Term(LAYER + "mlp.fc2.weight", "w f -> f w"),),
        "layers/feed_forward/down_bias": (Term(LAYER + "mlp.fc2.bias"),),
    }


UNREAD = (
    r"text_model\..*",
    r"(text|visual)_projection\..*",
    r"logit_(scale|bias)",
    r"(.*\.)?position_ids",
    # SigLIP's pooling head; like CLIP's norm of the pooled vector below, it comes after the
    # grid features, which are all that is used.
    r"vision_model\.head\..*",
)
UNREAD_WITHOUT_LAST_NORM = (r"vision_model\.post_layernorm\..*",)


def parse_tower(
    config: Document,
    preprocessor: Document,
    defaults: Defaults,
    *,
    class_token: bool,
    patch_bias: bool,
    first_norm: bool,
    last_norm: bool,
) -> VisionConfig:
    """Translates a config.json, of the complete model or of the tower alone, and a
    preprocessor_config.json (empty if there is none); the switches are those of `ViTConfig`.

    Raises: UserError for a setting that the encoder here does not support.
    """
    config.require("quantization_config")
    # The config of the complete model has the tower's under vision_config.
    tower = config.inside("vision_config") if config.given("vision_config") is not None else config
    tower.require("num_channels", 3)
    vit = ViTConfig(
        patch_size=tower.integer("patch_size", defaults.patch_size),
        layers=tower.integer("num_hidden_layers", 12),
        width=tower.integer("hidden_size", 768),
        heads=tower.integer("num_attention_heads", 12),
        feed_forward=tower.integer("intermediate_size", 3072),
        activation=tower.choice("hidden_act", ACTIVATIONS, defaults.activation),
        class_token=class_token,
        patch_bias=patch_bias,
        first_norm=first_norm,
        last_norm=last_norm,
        norm_eps=tower.number("layer_norm_eps", defaults.norm_eps),
    )
    if vit.width % vit.heads:
        tower.refuse("hidden_size", f"a multiple of num_attention_heads ({vit.heads})")
    mean, std = _pixels(preprocessor, defaults)
    return VisionConfig(
        image_size=tower.integer("image_size", 224),
        mean=mean,
        std=std,
        image_fit=_fit(preprocessor, defaults.fit),
        vit=vit,
    )


def tower_family(model_type: str, parse: Callable[[Document, Document], VisionConfig]) -> Family:
    """Makes a family with these tensors: the complete model, of which only the tower is read,
    or the tower alone, which transformers 5 save without the prefix of the names.
    """
    return Family(
        model_type,
        "vision_encoder",
        parse,
        table,
        prefix="vision_model.",
        unread=UNREAD,
        also_unread=lambda config: () if config.vit.last_norm else UNREAD_WITHOUT_LAST_NORM,
    )


def _fit(given: Document, default: Fit) -> Fit:
    """Returns how the folder's preprocessor makes an image square, by default as its family
    does.
    """
    size, crops = given.given("size"), given.given("do_center_crop")
    if isinstance(size, dict) and "height" in size:
        return "stretch"
    if crops or isinstance(size, int) or (isinstance(size, dict) and "shortest_edge" in size):
        # Without do_center_crop the image would not be square, so it is cropped all the same.
        return "crop"
    return default


def _pixels(given: Document, defaults: Defaults) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation by which the preprocessor normalises pixels."""
    if given.given("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    factor = given.number("rescale_factor", 1 / 255)
    if given.given("do_rescale") is False or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        given.refuse(
            "do_rescale" if given.given("do_rescale") is False else "rescale_factor", "1/255"
        )
    found = []
    for key, default in (("image_mean", defaults.mean), ("image_std", defaults.std)):
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
