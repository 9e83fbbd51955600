"""The optimizer against AdamW, clipping and schedules written out in float64 numpy."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flamingo_jax.configuring import from_config, from_json
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import OptimizerConfig, VisionConfig, ViTConfig
from flamingo_jax.models.vit import ViT
from flamingo_jax.pytrees import to_flat
from flamingo_jax.training.optimizer import (
    adaptive_clip,
    decay_mask,
    make_optimizer,
    make_schedule,
    unit_axes,
)
from tests.rounding import assert_close

CONFIG = OptimizerConfig(
    learning_rate=1e-2,
    warmup_steps=3,
    schedule="linear",
    beta1=0.8,
    beta2=0.95,
    weight_decay=0.3,
    clip_norm=1.0,
)
SHAPES = {
    "resampler/latents": (3, 4),
    "visual_projection": (4, 2),
    "gated_xattn/layers/query": (2, 3, 2, 2),
    "gated_xattn/layers/attention_norm/scale": (2, 3),
    "gated_xattn/layers/attention_gate": (2,),
    "extra_embedding": (1, 5),
}
DECAYED = {"visual_projection", "gated_xattn/layers/query", "extra_embedding"}
STEPS = 7


def arrays(
    seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES, scale: float = 1.0
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()
    }


def run(
    config: OptimizerConfig,
    parameters: dict[str, np.ndarray],
    gradients: list[dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    optimizer = make_optimizer(config, STEPS, parameters)
    values: dict[str, jax.Array] = jax.tree.map(jnp.asarray, parameters)
    state = optimizer.init(values)
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(
            jax.tree.map(jnp.asarray, gradient), state, values
        )
        values = optax.apply_updates(values, updates)
    return jax.tree.map(np.asarray, values)


def adamw(
    config: OptimizerConfig,
    parameters: dict[str, np.ndarray],
    gradients: list[dict[str, np.ndarray]],
    decayed: set[str],
) -> dict[str, np.ndarray]:
    x = {name: p.astype(np.float64) for name, p in parameters.items()}
    m, v = ({name: np.zeros_like(p) for name, p in x.items()} for _ in range(2))
    for step, gradient in enumerate(gradients, start=1):
        rate = config.learning_rate * min(step / config.warmup_steps, 1)
        if step - 1 > config.warmup_steps:
            rate *= 1 - (step - 1 - config.warmup_steps) / (STEPS - config.warmup_steps)
        norm = math.sqrt(
            sum(float(np.sum(np.square(g, dtype=np.float64))) for g in gradient.values())
        )
        scale = min(1.0, config.clip_norm / norm)
        for name in x:
            g = gradient[name].astype(np.float64) * scale
            m[name] = config.beta1 * m[name] + (1 - config.beta1) * g
            v[name] = config.beta2 * v[name] + (1 - config.beta2) * g**2
            direction = (
                m[name]
                / (1 - config.beta1**step)
                / (np.sqrt(v[name] / (1 - config.beta2**step)) + config.eps)
            )
            x[name] -= rate * (
                direction + (config.weight_decay * x[name] if name in decayed else 0)
            )
    return x


@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_adamw_with_clipping_and_masked_decay(scale: float) -> None:
    """Gradients below the clipping norm and above it."""
    parameters, gradients = arrays(0), [arrays(seed, scale=scale) for seed in range(1, STEPS + 1)]
    found, expected = (
        run(CONFIG, parameters, gradients),
        adamw(CONFIG, parameters, gradients, DECAYED),
    )
    for name in SHAPES:
        # Each step rounds the parameter, and its rate times a direction that is off by the
        # moments, the norm over all gradients and 1 - beta2, which is off by 1 / (1 - beta2)
        # times as much.
        terms = 2 + CONFIG.learning_rate * (8 + sum(map(math.prod, SHAPES.values())) + 20)
        assert_close(found[name], expected[name], STEPS * terms, err_msg=name)


def test_a_part_with_a_learning_rate_of_its_own() -> None:
    parameters, gradients = arrays(0), [arrays(1)]
    scaled = dataclasses.replace(CONFIG, learning_rate_scales={"resampler": 0.1})
    found, usual = run(scaled, parameters, gradients), run(CONFIG, parameters, gradients)
    for name in SHAPES:
        scale = 0.1 if name.startswith("resampler/") else 1.0
        moved = parameters[name] + scale * (usual[name] - parameters[name])
        assert_close(found[name], moved, terms=4, err_msg=name)
    with pytest.raises(UserError, match="learning_rate_scales has 'decoder', which is no trained"):
        make_optimizer(
            dataclasses.replace(CONFIG, learning_rate_scales={"decoder": 0.1}), STEPS, parameters
        )


def test_a_rate_that_falls_in_steps() -> None:
    config = dataclasses.replace(
        CONFIG,
        learning_rate=2e-3,
        end_learning_rate=1e-4,
        warmup_steps=2,
        schedule="stepwise",
        boundaries=(4, 6),
    )
    rates = [float(make_schedule(config, 8)(step)) for step in range(8)]
    for rate, wanted in zip(rates, [1e-3, 2e-3, 2e-3, 2e-3, 2e-4, 2e-4, 2e-5, 2e-5], strict=True):
        assert_close(rate, wanted, terms=4)
    refused = {
        "(6, 4)": {"boundaries": (6, 4)},
        "()": {"boundaries": ()},
        "(8,)": {"boundaries": (8,)},
        "schedule is 'linear'": {"schedule": "linear"},
    }
    for words, changes in (refused | {"boundary_factor is 0": {"boundary_factor": 0.0}}).items():
        with pytest.raises(UserError) as caught:
            make_schedule(dataclasses.replace(config, **changes), 8)
        assert words in str(caught.value)


def test_decay_by_name() -> None:
    def names(**changes: Any) -> set[str]:
        mask = decay_mask(dataclasses.replace(CONFIG, **changes), arrays(0))
        return {name for name, decays in mask.items() if decays}

    assert names() == DECAYED
    assert names(weight_decay_on_vectors=True) == set(SHAPES) - {"resampler/latents"}
    assert names(weight_decay_exclude=()) == DECAYED | {"resampler/latents"}
    assert names(weight_decay=0.0, weight_decay_exclude=("nothing",)) == set()
    with pytest.raises(UserError, match="'resampla/\\.\\*', which matches no trained parameter"):
        names(weight_decay_exclude=("resampla/.*",))
    with pytest.raises(UserError, match="matches no trained parameter"):
        names(weight_decay_exclude=("resampler",))  # whole names, not prefixes


def test_attention_biases_are_vectors() -> None:
    shapes = {
        "layers/attention/content_bias": jnp.zeros((2, 4, 8)),
        "layers/attention/query": jnp.zeros((2, 8, 4, 8)),
    }
    assert decay_mask(dataclasses.replace(CONFIG, weight_decay_exclude=()), shapes) == {
        "layers/attention/content_bias": False,
        "layers/attention/query": True,
    }


@pytest.mark.parametrize(
    ("schedule", "end", "expected"),
    [
        ("constant", 0.0, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ("linear", 0.2, [0.25, 0.5, 0.75, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        (
            "cosine",
            0.0,
            [0.25, 0.5, 0.75, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0],
        ),
    ],
)
def test_schedules(schedule: str, end: float, expected: list[float]) -> None:
    config = OptimizerConfig(
        learning_rate=2.0, warmup_steps=4, schedule=schedule, end_learning_rate=2 * end
    )  # type: ignore[arg-type]
    schedule = make_schedule(config, steps=8)
    assert_close([schedule(n) for n in range(9)], 2 * np.array(expected), terms=8)
    assert_close(schedule(100), 2 * expected[-1], terms=8, size=2.0)
    shared = make_schedule(config, steps=8, updates_per_step=2)
    assert [shared(n) for n in range(6)] == [schedule(n) for n in (0, 0, 1, 1, 2, 2)]


def test_no_warm_up() -> None:
    assert make_schedule(OptimizerConfig(learning_rate=0.5, warmup_steps=0), steps=3)(0) == 0.5


UNITS = {
    # Name: the shape of one layer, and of the matrix (or vector) that it is without its axes of
    # heads or places.
    "vision/final/weight": ((2, 2, 3, 4), (12, 4)),
    "vision/stages/0/layers/first/weight": ((2, 2, 3, 4), (12, 4)),
    "vision/layers/squeeze_excite/down": ((3, 4), (3, 4)),
    "vision/layers/first/bias": ((4,), (4,)),
    "vision/layers/skip_gain": ((), (1,)),
    "vision/layers/attention/query": ((6, 3, 2), (6, 6)),
    "vision/layers/attention/key": ((6, 3, 2), (6, 6)),
    "vision_encoder/layers/attention/value": ((6, 3, 2), (6, 6)),
    "vision/layers/attention/out": ((3, 2, 6), (6, 6)),
    "vision/layers/attention/query_bias": ((3, 2), (6,)),
    "vision/layers/attention/out_bias": ((6,), (6,)),
    "vision/layers/attention_norm/scale": ((6,), (6,)),
    "vision/layers/feed_forward/up": ((6, 5), (6, 5)),
    "vision/patch_embedding": ((12, 6), (12, 6)),
    "vision/position_embedding": ((2, 2, 6), (4, 6)),
    "vision/class_embedding": ((6,), (6,)),
}


@pytest.mark.parametrize("name", UNITS)
def test_adaptive_clip_of_every_unit(name: str) -> None:
    """Unit by unit in float64, and by optax, of the matrix whose columns are all that feeds one
    output.
    """
    shape, unfused = UNITS[name]
    layers = 2 if "layers" in name else 1
    rng = np.random.default_rng(3)
    parameter = rng.normal(size=(layers, *unfused))
    units = (*[1] * (len(unfused) - 1), unfused[-1]) if len(unfused) > 1 else (1,)
    gradient = rng.normal(size=(layers, *unfused)) * 10 ** rng.uniform(-4, 0, size=(layers, *units))
    gradient[-1, ..., -1] = 1.0  # certainly clipped
    parameter[0, ..., 0] = 0  # held to eps
    expected = gradient.copy()
    for layer in range(layers):
        for unit in range(unfused[-1]) if len(unfused) > 1 else [slice(None)]:
            g, w = gradient[layer][..., unit], parameter[layer][..., unit]
            allowed, norm = 0.01 * max(np.linalg.norm(w), 1e-3), np.linalg.norm(g)
            expected[layer][..., unit] = g * min(1.0, allowed / norm)

    def ours(a: np.ndarray) -> jax.Array:
        stacked = a.reshape(layers, *shape) if "layers" in name else a.reshape(shape)
        return jnp.asarray(stacked, jnp.float32)

    found = np.asarray(adaptive_clip(name, ours(gradient), ours(parameter), 0.01))
    np.testing.assert_allclose(found, ours(expected), rtol=1e-5, atol=1e-9)
    assert (found != ours(gradient)).any()
    theirs = optax.adaptive_grad_clip(0.01)
    for layer, clipped in enumerate(found.reshape(layers, *unfused)):
        g, w = (jnp.asarray(a[layer], jnp.float32) for a in (gradient, parameter))
        expected_here, _ = theirs.update(g, theirs.init(0), w)
        np.testing.assert_allclose(clipped, expected_here, rtol=1e-5, atol=1e-9)


def test_every_parameter_of_a_vision_transformer_has_its_units() -> None:
    """As many units as outputs: of a matrix its columns, of attention's maps (head, place in
    it), of a vector one.
    """
    vit = ViTConfig(
        patch_size=4,
        layers=2,
        width=12,
        heads=3,
        feed_forward=20,
        class_token=True,
        patch_bias=True,
        first_norm=True,
    )
    model = nnx.eval_shape(lambda: ViT(VisionConfig(image_size=16, vit=vit), rngs=nnx.Rngs(0)))
    outputs = {
        "query": 12,
        "key": 12,
        "value": 12,
        "out": 12,
        "up": 20,
        "down": 12,
        "patch_embedding": 12,
        "position_embedding": 12,
    }
    for name, leaf in to_flat(nnx.state(model)).items():
        axes, stacked = unit_axes(f"vision/{name}", leaf.ndim), 2 if "layers" in name else 1
        units = math.prod(size for axis, size in enumerate(leaf.shape) if axis not in axes)
        assert units == stacked * outputs.get(name.split("/")[-1], 1), name


def test_adaptive_clipping_leaves_the_global_norm_to_the_rest() -> None:
    """The paper's contrastive stage: unit by unit on the vision encoder, a global norm on the
    text encoder.
    """
    shapes = {"vision/final/weight": (1, 1, 3, 4), "text/embedding": (5, 4)}
    config = OptimizerConfig(
        weight_decay=0.0,
        weight_decay_exclude=(),
        clip_norm=10.0,
        adaptive_clip=1e-2,
        beta1=0.0,
        eps=1e6,
        learning_rate=1e6,
        warmup_steps=0,
    )
    parameters, gradient = arrays(0, shapes), arrays(1, shapes, scale=100.0)
    # With beta1 = 0 and a large eps Adam's direction is the gradient over eps, so that the step
    # shows the clipped gradient.
    moved = run(config, parameters, [gradient])
    clipped = {name: parameters[name] - moved[name] for name in shapes}
    np.testing.assert_allclose(np.linalg.norm(clipped["text/embedding"]), 10.0, rtol=1e-3)
    units = np.linalg.norm(clipped["vision/final/weight"].reshape(3, 4), axis=0)
    np.testing.assert_allclose(
        units,
        1e-2 * np.linalg.norm(parameters["vision/final/weight"].reshape(3, 4), axis=0),
        rtol=1e-2,
    )


def test_a_gradient_of_zeros_stays_finite() -> None:
    parameters = arrays(0)
    moved = run(
        dataclasses.replace(CONFIG, weight_decay=0.0),
        parameters,
        [jax.tree.map(np.zeros_like, parameters)],
    )
    for name in SHAPES:
        np.testing.assert_array_equal(moved[name], parameters[name])


def test_an_old_run_is_read() -> None:
    """Of a run that was written with other names for these fields."""
    old = {"peak_rate": 2e-3, "end_rate": 1e-4, "decay": "stepwise", "decay_at": [4, 6]}
    old |= {"decay_factor": 0.5, "no_decay": [], "decay_vectors": True}
    assert from_json(OptimizerConfig, old) == OptimizerConfig(
        learning_rate=2e-3,
        end_learning_rate=1e-4,
        schedule="stepwise",
        boundaries=(4, 6),
        boundary_factor=0.5,
        weight_decay_exclude=(),
        weight_decay_on_vectors=True,
    )
    with pytest.raises(UserError, match=r"config\.peak_rate is config\.learning_rate now"):
        from_config(OptimizerConfig, {"peak_rate": 1e-3})
