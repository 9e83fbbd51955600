"""Colour jitter on the device against the same written for one image at a time on a host."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.experiment import (
    ContrastiveConfig,
    TextEncoderConfig,
    VisionConfig,
    ViTConfig,
)
from flamingo_jax.models.dual_encoder import DualEncoder
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.processing.images import pad
from flamingo_jax.processing.jitter import jittered
from flamingo_jax.tasks.contrastive import ContrastiveTask
from flamingo_jax.tasks.flamingo import FlamingoTask
from tests.training import world

GREY = np.array([0.299, 0.587, 0.114])
SIDE = 24
SIZES = [(24, 24), (24, 17), (9, 24), (1, 24), (23, 24)]


def on_a_host(
    frames: list[np.ndarray], brightness: float, contrast: float, saturation: float, hue: float
) -> list[np.ndarray]:
    """float64 [h, w, 3] each, not yet rounded: brightness, saturation and hue as one map,
    contrast about the mean grey of all frames.
    """
    mean = float(np.mean([frame.reshape(-1, 3).mean(axis=0) @ GREY for frame in frames]))
    c, s = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
    third, root = (1 - c) / 3, math.sqrt(1 / 3) * s
    turned = np.array(
        [
            [c + third, third - root, third + root],
            [third + root, c + third, third - root],
            [third - root, third + root, c + third],
        ]
    )
    colour = (
        brightness * (saturation * np.eye(3) + (1 - saturation) * np.ones((3, 1)) * GREY) @ turned
    )
    return [
        (frame @ (contrast * colour).T + (1 - contrast) * mean).clip(0, 255) for frame in frames
    ]


@pytest.mark.parametrize("seed", range(4))
def test_every_image_is_as_on_a_host_and_its_padding_as_it_was(seed: int) -> None:
    """Clips of one to three frames of different sizes, at strengths up to 0.5; a value may
    round to either side of a half.
    """
    rng = np.random.default_rng(seed)
    visuals, mean = 6, (0.485, 0.456, 0.406)
    images = np.zeros((visuals, 3, SIDE, SIDE, 3), np.uint8)
    jitter = np.zeros((visuals, 3, 6), np.float32)
    expected, inside = images.astype(np.float64), np.zeros(images.shape, bool)
    for visual in range(visuals):
        factors = (*rng.uniform(0.5, 1.5, 3), rng.uniform(-0.05, 0.05))
        sizes = [SIZES[place] for place in rng.integers(0, len(SIZES), rng.integers(1, 4))]
        frames = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
        for place, (frame, made) in enumerate(
            zip(frames, on_a_host(frames, *factors), strict=True)
        ):
            jitter[visual, place] = *factors, *frame.shape[:2]
            pad(frame, SIDE, mean, out=images[visual, place])
            top, left = ((SIDE - side) // 2 for side in frame.shape[:2])
            box = (
                visual,
                place,
                slice(top, top + frame.shape[0]),
                slice(left, left + frame.shape[1]),
            )
            expected[box], inside[box] = made, True
    found = np.asarray(jax.jit(jittered)(images, jitter))
    assert found.dtype == np.uint8 and (found[inside] != images[inside]).mean() > 0.9
    np.testing.assert_array_equal(found[~inside], images[~inside])
    # Sums of three products of at most 255 * 1.5 * 1.5 * 2 in float32 err by some 1e-3 at the
    # most.
    assert np.abs(found[inside] - expected[inside]).max() <= 0.5 + 1e-3


def test_the_identity_changes_nothing() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 2, SIDE, SIDE, 3), dtype=np.uint8)
    same = np.broadcast_to(np.array([1, 1, 1, 0, SIDE, SIDE], np.float32), (2, 2, 6))
    np.testing.assert_array_equal(jittered(images, same), images)
    grey = np.repeat(images[..., :1], 3, axis=-1)
    # Hue and saturation leave greys grey.
    turned = np.asarray(
        jittered(
            grey, np.broadcast_to(np.array([1, 1, 0.3, 0.4, SIDE, SIDE], np.float32), (2, 2, 6))
        )
    )
    assert np.abs(turned.astype(int) - grey).max() <= 1


def jitter_of(images: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    factors = [rng.uniform(0.6, 1.4, images.shape[:-3]) for _ in range(3)]
    sizes = [np.full(images.shape[:-3], side) for side in (images.shape[-3], images.shape[-2] - 8)]
    return np.stack([*factors, rng.uniform(-0.03, 0.03, images.shape[:-3]), *sizes], -1).astype(
        np.float32
    )


VISION = VisionConfig(
    image_size=32, vit=ViTConfig(patch_size=8, layers=1, width=16, heads=2, feed_forward=16)
)


def test_a_flamingo_sees_the_jittered_images_in_every_form() -> None:
    """The loss of images with their jitter is that of images that were jittered before, in a
    batch, in microbatches and in a stream with a dataset that has none; the text alone knows
    nothing of it.
    """
    config = dataclasses.replace(
        world.FLAMINGO,
        vision=VISION,
        conditioning=dataclasses.replace(world.FLAMINGO.conditioning, gate_init=0.5),
    )
    model, task = Flamingo(config, rngs=nnx.Rngs(0)), FlamingoTask()
    names = ("ltip", "vtp")
    plain = {name: jax.tree.map(jnp.asarray, world.batches()[name]) for name in names}
    jitter = jnp.asarray(jitter_of(plain["vtp"]["images"], 1))
    given = plain["vtp"] | {"jitter": jitter}
    before = plain["vtp"] | {"images": jittered(plain["vtp"]["images"], jitter)}
    loss = nnx.jit(lambda model, batch: task.losses(model, {"": batch}, None)[""].total)
    expected = float(loss(model, before))
    assert expected != pytest.approx(float(loss(model, plain["vtp"])), rel=1e-5)
    assert float(loss(model, given)) == pytest.approx(expected, rel=1e-6)
    parts = task.microbatches(given, 2)
    apart = [
        float(loss(model, jax.tree.map(lambda a, part=part: a[part], parts))) for part in range(2)
    ]
    assert sum(apart) == pytest.approx(expected, rel=1e-5)
    stream = nnx.jit(
        lambda model, batches: {
            name: found.total for name, found in task.losses(model, batches, None).items()
        }
    )
    found = stream(model, plain | {"vtp": given})
    assert float(found["vtp"]) == pytest.approx(expected, rel=1e-5)
    assert float(found["ltip"]) == pytest.approx(float(loss(model, plain["ltip"])), rel=1e-5)
    assert "jitter" not in task.without_images(given)


def test_contrastive_pairs_are_jittered_in_parts_and_streams() -> None:
    config = ContrastiveConfig(VISION, TextEncoderConfig(40, 1, 16, 2, 6), joint_width=16)
    model, task = DualEncoder(config, rngs=nnx.Rngs(0)), ContrastiveTask(config)
    rng = np.random.default_rng(0)
    batch = {
        "images": rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8),
        "tokens": rng.integers(0, 40, (4, 6), dtype=np.int32),
        "mask": np.ones((4, 6), bool),
    }
    batch = {name: jnp.asarray(a) for name, a in batch.items()}
    jitter = jnp.asarray(jitter_of(batch["images"], 2))
    given = batch | {"jitter": jitter}
    before = batch | {"images": jittered(batch["images"][:, None], jitter[:, None])[:, 0]}
    loss = nnx.jit(lambda model, batch: task.losses(model, {"": batch}, None)[""].total)
    expected = float(loss(model, before))
    assert expected != pytest.approx(float(loss(model, batch)), rel=1e-5)
    assert float(loss(model, given)) == pytest.approx(expected, rel=1e-6)
    parts = {name: a[0] for name, a in task.microbatches(given, 2).items()}
    assert float(loss(model, parts)) == pytest.approx(expected, rel=1e-5)
    streams = nnx.jit(
        lambda model, batches: {
            name: loss.total for name, loss in task.losses(model, batches, None).items()
        }
    )
    found = streams(model, {"a": given, "b": batch})
    assert float(found["a"]) == pytest.approx(expected, rel=1e-5) and float(
        found["b"]
    ) == pytest.approx(float(loss(model, batch)), rel=1e-5)
