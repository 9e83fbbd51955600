"""The Vision Transformer against a float64 numpy version of CLIP's and SigLIP's forms."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import VisionConfig, ViTConfig
from flamingo_jax.models.vision import vision_encoder
from flamingo_jax.models.vit import ViT
from flamingo_jax.pytrees import from_flat, to_flat
from tests.models.filling import filled
from tests.rounding import assert_close

TERMS = 48 + 16 + 2 * (16 + 8 + 4 + 10 + 8 + 16 + 8 + 12) + 16
"""Patches, a norm; in each of two layers a norm, projections, scores, keys, the map out, a norm
and two products; a norm.
"""
CLIP = ViTConfig(patch_size=4, layers=2, width=8, heads=2, feed_forward=12)
SIGLIP = dataclasses.replace(
    CLIP,
    activation="gelu",
    class_token=False,
    patch_bias=True,
    first_norm=False,
    last_norm=True,
    norm_eps=1e-6,
)
FORMS = {"clip": CLIP, "siglip": SIGLIP}


def norm(x: np.ndarray, parameters: dict[str, Any], eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * parameters[
        "scale"
    ] + parameters["bias"]


def activation(x: np.ndarray, name: str) -> np.ndarray:
    if name == "quick_gelu":
        return x / (1 + np.exp(-1.702 * x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def published(image: np.ndarray, parameters: dict[str, Any], config: ViTConfig) -> np.ndarray:
    """One image, patch by patch and head by head -> [patches, C]."""
    side, rows = config.patch_size, image.shape[0] // config.patch_size
    patches = [
        image[side * i : side * (i + 1), side * j : side * (j + 1)]
        for i in range(rows)
        for j in range(rows)
    ]
    # A convolution's weights [rows, columns, colours, outputs], as the published forms have
    # them.
    kernel = parameters["patch_embedding"].reshape(side, side, 3, config.width)
    x = np.stack([np.einsum("ijc,ijcd->d", patch, kernel) for patch in patches]) + parameters.get(
        "patch_bias", 0
    )
    x = x + parameters["position_embedding"].reshape(rows * rows, -1)
    if config.class_token:
        x = np.concatenate([parameters["class_embedding"][None], x])
    if config.first_norm:
        x = norm(x, parameters["first_norm"], config.norm_eps)
    for number in range(config.layers):
        layer = jax.tree.map(lambda a, number=number: a[number], parameters["layers"])
        attention, h = layer["attention"], norm(x, layer["attention_norm"], config.norm_eps)
        x = x + attention["out_bias"]
        for head in range(config.heads):
            query, key, value = (
                h @ attention[n][:, head] + attention[f"{n}_bias"][head]
                for n in ("query", "key", "value")
            )
            weights = np.exp(query @ key.T / math.sqrt(config.width // config.heads))
            x = x + weights / weights.sum(-1, keepdims=True) @ value @ attention["out"][head]
        feed, h = layer["feed_forward"], norm(x, layer["feed_forward_norm"], config.norm_eps)
        x = (
            x
            + activation(h @ feed["up"] + feed["up_bias"], config.activation) @ feed["down"]
            + feed["down_bias"]
        )
    x = x[1:] if config.class_token else x
    return norm(x, parameters["last_norm"], config.norm_eps) if config.last_norm else x


def make(form: str, image_size: int = 12) -> ViT:
    return filled(
        lambda rngs: vision_encoder(VisionConfig(image_size=image_size, vit=FORMS[form]), rngs=rngs)
    )


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_published_form(form: str) -> None:
    encoder = make(form)
    parameters = from_flat(
        {name: np.asarray(a, np.float64) for name, a in to_flat(nnx.state(encoder)).items()}
    )
    images = np.random.default_rng(1).normal(size=(2, 12, 12, 3)).astype(np.float32)
    features = encoder(jnp.asarray(images))
    assert features.shape == (2, 3, 3, 8)
    for image, found in zip(images, features, strict=True):
        expected = published(image.astype(np.float64), parameters, FORMS[form])
        assert_close(found.reshape(9, 8), expected, TERMS)


def test_positions_stretch_to_images_of_another_size() -> None:
    encoder = make("siglip")
    larger = encoder(jnp.ones((1, 24, 24, 3)))
    assert larger.shape == (1, 6, 6, 8)
    encoder.position_embedding[...] = jnp.ones_like(encoder.position_embedding[...])
    # Equal patches at equal positions have equal features, however many there are.
    # Means over 36 keys and over 9 of equal values.
    one, other = (encoder(jnp.ones((1, side, side, 3))) for side in (24, 12))
    assert_close(one[0, 5, 2], other[0, 0, 0], terms=2 * TERMS)


def test_size_of_clips_large_encoder() -> None:
    """ViT-L/14 has 303,179,776 parameters, of which the pooled vector's norm and the class
    token's own position are not ours.
    """
    model = nnx.eval_shape(
        lambda: vision_encoder(VisionConfig(image_size=224, vit=ViTConfig()), rngs=nnx.Rngs(0))
    )
    assert (
        sum(math.prod(a.shape) for a in to_flat(nnx.state(model)).values())
        == 303_179_776 - 2 * 1024 - 1024
    )


def test_what_does_not_fill_a_patch_is_left_out() -> None:
    encoder, images = (
        make("siglip", image_size=14),
        jnp.asarray(np.random.default_rng(1).normal(size=(1, 14, 14, 3)), jnp.float32),
    )
    assert encoder.grid == 3
    np.testing.assert_array_equal(encoder(images), encoder(images[:, :12, :12]))


def test_an_image_smaller_than_a_patch_is_refused() -> None:
    with pytest.raises(UserError, match="image_size is 3, .* a patch of 4: make it a multiple"):
        make("clip", image_size=3)
