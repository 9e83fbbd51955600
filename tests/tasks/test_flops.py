"""Model FLOPs against sums written out by hand, against the products of the traced gradient,
and against published figures.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.experiment import (
    AttentionConfig,
    ContrastiveConfig,
    DatasetConfig,
    Experiment,
    FeedForwardConfig,
    LanguageModelConfig,
    PositionsConfig,
    TextEncoderConfig,
    TrainingConfig,
    VisionConfig,
)
from flamingo_jax.models.nfnet import NFNet
from flamingo_jax.tasks import stages
from flamingo_jax.tasks.flops import (
    Cost,
    Work,
    encoder_cost,
    peak_flops,
    product_flops,
    step_cost,
    work_in,
)
from flamingo_jax.training.state import split_model
from flamingo_jax.training.step import gradients
from tests.training import world

FLOAT32 = TrainingConfig(compute_dtype="float32")
MACS = {
    "F0": (256, 12.38e9),
    "F1": (320, 35.54e9),
    "F3": (416, 114.76e9),
    "F6": (576, 377.28e9),
}
"""Brock et al. 2021, table 6, and the image sizes they are for: multiplications with their
additions as one.
"""


def encoder(variant: str) -> NFNet:
    return nnx.eval_shape(lambda: NFNet(VisionConfig(variant=variant), rngs=nnx.Rngs(0)))


def gradient_flops(experiment: Experiment, batch: dict[str, np.ndarray]) -> int:
    """Of every product in the gradient as it is traced, padding and all."""
    model = nnx.eval_shape(
        lambda: stages.build_model(experiment, nnx.Rngs(params=jax.random.key(0)))
    )
    graph, shapes = split_model(model)
    still = tuple(f"{part}/" for part in stages.PARTS if part not in stages.unfrozen(experiment))
    frozen = {
        name: s
        for name, s in shapes.items()
        if experiment.task == "flamingo" and name.startswith(still)
    }
    trainable = {name: s for name, s in shapes.items() if name not in frozen}
    task = stages.make_task(experiment)
    data = {"one": DatasetConfig()}

    def run(trainable: Any, frozen: Any, batch: Any, key: Any) -> Any:
        return gradients(graph, task, trainable, frozen, {"one": batch}, key, data)

    key = jax.eval_shape(lambda: jax.random.key(0))
    return product_flops(jax.make_jaxpr(run)(trainable, frozen, batch, key).jaxpr)


@pytest.mark.parametrize("variant", MACS)
def test_encoders(variant: str) -> None:
    size, published = MACS[variant]
    flops, cells = encoder_cost(encoder(variant), size)
    assert flops / 2 == pytest.approx(published, rel=0.03) and cells == (size // 32) ** 2


def test_a_scan_counts_as_often_as_it_runs() -> None:
    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        x = jax.lax.scan(lambda x, _: (jax.checkpoint(jnp.dot)(x, w), None), x, None, length=5)[0]
        return jax.lax.conv_general_dilated(
            x[None, :, :, None],
            jnp.ones((3, 2, 1, 7)),
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    jaxpr = jax.make_jaxpr(run)(jnp.ones((4, 6)), jnp.ones((6, 6))).jaxpr
    assert product_flops(jaxpr) == 5 * 2 * 4 * 6 * 6 + 2 * (2 * 5 * 7) * (3 * 2)


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_is_its_gradients_products(tied: bool) -> None:
    """All but what is no weight meeting a token: attention's three products of activations, and
    codes of distances.
    """
    layers, width, rows, length = 3, 16, 2, 24
    config = LanguageModelConfig(
        vocab_size=40,
        layers=layers,
        width=width,
        attention=AttentionConfig(heads=2, head_width=8),
        feed_forward=FeedForwardConfig(width=48),
        tied_embeddings=tied,
    )
    experiment = Experiment(task="language_modelling", language_model=config, training=FLOAT32)
    full = np.ones((rows, length), np.int32)
    batch = {"tokens": full, "positions": full, "segments": full, "loss_mask": full > 0}
    work = work_in([batch])
    assert work == Work(rows * length)
    assert step_cost(experiment) == Cost(
        6 * (layers * (4 * width * width + 2 * width * 48) + 40 * width)
    )
    scores = length * (
        3 * length + 1
    )  # queries by keys, by distances from 0 to length, and weights by values
    attention = 3 * layers * 2 * rows * scores * width + layers * 4 * (length + 1) * width * width
    assert gradient_flops(experiment, batch) == step_cost(experiment).of(work) + attention


def test_a_flamingo_written_out() -> None:
    """The tiny one: widths 16, 2 latents, 2 language model layers, one of the resampler,
    feed-forwards of 32, 30 pieces and one more.
    """
    block, feed_forward = 16 * 16, 2 * 16 * 32
    vision, cells = encoder_cost(encoder("tiny"), 32)
    assert cells == 16
    cost = step_cost(world.experiment())
    assert cost == Cost(
        token=4 * (2 * (4 * block + feed_forward) + 30 * 16) + 6 * (2 * feed_forward + 16),
        xattn_token=6 * 2 * 2 * block,
        visual=6 * 2 * (4 * block + feed_forward + block + 2 * 2 * block),
        frame=vision + 16 * (4 * 160 * 16 + 6 * 2 * block),
    )
    tuned = step_cost(
        world.experiment(
            training=dataclasses.replace(world.experiment().training, unfreeze_vision_encoder=True)
        )
    )
    assert tuned == cost._replace(frame=3 * vision + 16 * (6 * 160 * 16 + 6 * 2 * block))
    blind = dataclasses.replace(world.experiment().training, use_visuals=False)
    assert step_cost(world.experiment(training=blind)) == Cost(cost.token)


@pytest.mark.parametrize(
    ("unfrozen", "kind", "resampler", "more"),
    [
        ("", "gated_xattn_dense", "perceiver", 0.03),
        ("vision_encoder", "gated_xattn_dense", "perceiver", 0.05),
        ("language_model", "gated_xattn_dense", "perceiver", 0.03),
        ("", "vanilla_xattn", "transformer", 0.03),
        ("", "grafting", "mlp", 0.03),
    ],
)
def test_a_flamingo_is_nearly_its_gradients_products(
    unfrozen: str, kind: Any, resampler: Any, more: float
) -> None:
    """Wide layers, so that attention's products of activations, which are not counted, are few.
    A strided convolution's gradient is traced over the zeros between its places too.
    """
    wide = dataclasses.replace(
        world.FLAMINGO,
        language_model=LanguageModelConfig(
            vocab_size=world.VOCABULARY,
            layers=2,
            width=256,
            attention=AttentionConfig(heads=2, head_width=128),
            feed_forward=FeedForwardConfig(width=1024),
            positions=PositionsConfig(kind="rotary"),
        ),
        resampler=dataclasses.replace(
            world.FLAMINGO.resampler,
            kind=resampler,
            width=256,
            head_width=128,
            feed_forward=1024,
        ),
        conditioning=dataclasses.replace(
            world.FLAMINGO.conditioning,
            kind=kind,
            head_width=128,
            feed_forward=1024,
            grafted_layers=2,
        ),
    )
    changes: dict[str, Any] = {f"unfreeze_{unfrozen}": True} if unfrozen else {}
    experiment = world.experiment(flamingo=wide, training=dataclasses.replace(FLOAT32, **changes))
    batch = world.batch(world.DATA["vtp"], 0)
    batch["segments"] = np.ones_like(batch["segments"])
    traced, counted = gradient_flops(experiment, batch), step_cost(experiment).of(work_in([batch]))
    assert counted < traced == pytest.approx(counted, rel=more)


def test_a_contrastive_model() -> None:
    config = ContrastiveConfig(
        vision=VisionConfig(variant="tiny", image_size=32),
        text=TextEncoderConfig(vocab_size=11, layers=2, width=8, heads=2, max_length=4),
        joint_width=12,
    )
    vision, _ = encoder_cost(encoder("tiny"), 32)
    cost = step_cost(Experiment(task="contrastive", contrastive=config, training=FLOAT32))
    assert cost == Cost(6 * 2 * (4 * 64 + 2 * 8 * 32), 0, 6 * (160 + 8) * 12, 3 * vision)


def test_only_what_is_real_is_work() -> None:
    pages = world.batch(world.DATA["m3w"], 0)
    tokens = int((pages["segments"] > 0).sum())
    pages["frame_mask"] = np.zeros((16, 2), bool)
    pages["frame_mask"][:3, 0] = pages["frame_mask"][0, 1] = True
    text: dict[str, Any] = {"segments": np.array([[1, 1, 2, 0]])}
    assert work_in([pages, text]) == Work(tokens + 3, tokens, 3, 4)
    pairs = {
        "mask": np.array([[True, True], [True, False], [False, False]]),
        "images": np.zeros((3, 2, 2, 3), np.uint8),
    }
    assert work_in([pairs]) == Work(3, 0, 2, 2)
    traced = jax.jit(lambda batches: work_in(batches))([{"mask": pairs["mask"]}, text])
    assert traced == Work(6, 0, 2, 2)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
    ],
)
def test_peaks(kind: str, peak: float | None) -> None:
    assert peak_flops(kind) == peak
