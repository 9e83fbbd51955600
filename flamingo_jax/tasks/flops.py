"""Counts the model FLOPs of a training step, for model FLOPs utilisation (MFU = model FLOPs /
(seconds * peak FLOPs per second of the devices)).

A multiply-add is two FLOPs. Per token (or visual, or frame) a weight costs
  6 if it is trained: forward, gradient of its input, gradient of itself;
  4 if it is frozen, but comes after trained weights: no gradient of itself;
  4 if it is the first trained weight: no gradient of its input;
  2 if it is frozen and comes before all trained weights.
Only real tokens, visuals and frames are counted. Attention scores, padding, recomputation
(remat) and the optimizer are not, so that MFU is underestimated rather than overestimated.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from flamingo_jax.experiment import Experiment
from flamingo_jax.pytrees import to_flat
from flamingo_jax.tasks import stages
from flamingo_jax.weight_parts import is_multiplied, is_update, weight_name

PEAKS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite|TPU v5e", 197e12),
    ("TPU v5|TPU v5p", 459e12),
    ("TPU v6 lite|TPU v6e", 918e12),
    (r"NVIDIA (H100 \d+GB HBM3|G?H200.*)", 989e12),
    ("NVIDIA A100.*", 312e12),
)
"""Regular expressions of `jax.Device.device_kind` -> dense bfloat16 FLOPs per second, as
published by the makers.
"""

_LAYER = "layers/(attention/)?(query|key|value|out)|layers/feed_forward/(gate|up|down)"


class Work(NamedTuple):
    """Counts of what is real, not padding, in a batch."""

    tokens: int = 0
    xattn_tokens: int = 0
    """Tokens of datasets with visuals, for which cross-attention is computed."""
    visuals: int = 0
    """Pairs in the contrastive stage."""
    frames: int = 0


class Cost(NamedTuple):
    """FLOPs of an update per unit of each field of `Work`, in the same order."""

    token: int = 0
    xattn_token: int = 0
    visual: int = 0
    frame: int = 0

    def of(self, work: Work) -> int:
        """Computes the FLOPs of all the work."""
        return sum(cost * count for cost, count in zip(self, work, strict=True))


def work_in(batches: Iterable[Mapping[str, Any]]) -> Work:
    """Counts the real work in any task's batches, of numpy or traced JAX arrays; the counts
    are arrays of the same kind.
    """
    works = [_work_in(batch) for batch in batches]
    return Work(*(sum(counts) for counts in zip(*works, strict=True)))


def _work_in(batch: Mapping[str, Any]) -> Work:
    if "mask" in batch:  # Contrastive: images and captions.
        pairs = batch["mask"].any(1).sum()
        return Work(batch["mask"].sum(), 0, pairs, pairs)
    tokens = (batch["segments"] > 0).sum()
    if "frame_mask" not in batch:
        return Work(tokens)
    return Work(tokens, tokens, batch["frame_mask"].any(1).sum(), batch["frame_mask"].sum())


def computed_tokens(batches: Iterable[Mapping[str, Any]]) -> int:
    """Counts all tokens of the batches, padding included."""
    return sum(batch["tokens"].size for batch in batches)


def step_cost(experiment: Experiment) -> Cost:
    """Computes the cost of the experiment's update, from the shapes of the real model."""
    model: Any = nnx.eval_shape(
        lambda: stages.build_model(experiment, nnx.Rngs(params=jax.random.key(0)))
    )
    sizes = {name: math.prod(shape.shape) for name, shape in to_flat(nnx.state(model)).items()}

    updated = any(map(is_update, sizes))

    def named(pattern: str, prefix: str = "") -> dict[str, int]:
        return {
            name: size
            for name, size in sizes.items()
            if re.fullmatch(f"{prefix}({pattern})", weight_name(name)) and is_multiplied(name)
        }

    def weights(pattern: str, prefix: str = "") -> int:
        return sum(named(pattern, prefix).values())

    def language_model(prefix: str, each: int) -> int:
        """Computes FLOPs per token of a language model whose weights cost `each`; with LoRA
        its own matrices cost 4 (frozen after trained ones) and the updates 6.
        """
        head = "head" if f"{prefix}head" in map(weight_name, sizes) else "embedding"
        return sum(
            size * (6 if is_update(name) else 4 if updated else each)
            for name, size in named(f"{_LAYER}|{head}", prefix).items()
        )

    if experiment.task == "language_modelling":
        return Cost(language_model("", 6))
    config = stages.model_config(experiment)
    if experiment.task == "contrastive":
        encoder, _ = encoder_cost(model.vision, config.vision.image_size)
        return Cost(
            6 * weights(_LAYER, "text/"),
            0,
            6 * weights("(vision|text)_projection"),
            3 * encoder,
        )

    unfrozen = stages.unfrozen(experiment)
    token = language_model("language_model/", 6 if "language_model" in unfrozen else 4)
    token += 6 * weights(
        f"gated_xattn/layers/feed_forward/(up|down)|grafted/({_LAYER})|extra_embedding"
    )
    if not experiment.training.use_visuals:
        return Cost(token)
    encoder, cells = encoder_cost(model.vision_encoder, config.vision.image_size)
    encoder_trains = "vision_encoder" in unfrozen
    text = config.conditioning.text_window
    encoder *= 0 if experiment.training.cache_features else 3 if encoder_trains else 1
    visual_token = weights("visual_projection|gated_xattn/layers/(key|value)")
    layers, kind = weights(_LAYER, "resampler/"), config.resampler.kind
    # Which weights of a layer are multiplied with what: in the perceiver, latents with all and
    # cells with keys and values; in the transformer, latents and cells with all; in the MLP,
    # cells with all, and its map from cells to tokens with every channel.
    latent = {"perceiver": layers, "transformer": layers, "mlp": 0}[kind]
    of_cell = weights("resampler/layers/(key|value)") if kind == "perceiver" else layers
    channels = weights("resampler/cells_to_tokens") * config.resampler.width
    cell = (6 if encoder_trains else 4) * weights("resampler/input_projection") + 6 * of_cell
    return Cost(
        token,
        6 * weights(f"gated_xattn/layers/({'query|key|value|out' if text else 'query|out'})"),
        6 * (config.resampler.latents * (latent + visual_token) + channels),
        encoder + cells * cell,
    )


def encoder_cost(encoder: Any, image_size: int) -> tuple[int, int]:
    """Computes the forward FLOPs of a vision encoder for one image, and the number of cells of
    its grid. The encoder's arrays may be ShapeDtypeStructs.
    """
    graph, state = nnx.split(encoder)
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    jaxpr, grid = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x), return_shape=True)(
        state, image
    )
    return product_flops(jaxpr.jaxpr), math.prod(grid.shape[1:3])


def product_flops(jaxpr: Jaxpr) -> int:
    """Counts the FLOPs of the matrix products and (forward) convolutions of a traced function.

    A scan's body counts once per iteration (XLA's own cost analysis counts it once); a `while`
    body and every branch of a `cond` count once.
    """
    total = 0
    equation: Any
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        size = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if name == "dot_general":
            contracted = parameters["dimension_numbers"][0][0]
            total += (
                2 * size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            )
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            total += (
                2 * size * math.prod(kernel) // kernel[parameters["dimension_numbers"].rhs_spec[0]]
            )
        else:
            times = parameters["length"] if name == "scan" else 1
            total += times * sum(product_flops(inner) for inner in _inner(parameters))
    return total


def _inner(parameters: Mapping[str, Any]) -> list[Jaxpr]:
    """Collects the jaxprs among an equation's parameters: bodies of jit, scan, cond, ..."""
    leaves = jax.tree.leaves(dict(parameters), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr))
    return [
        x.jaxpr if isinstance(x, ClosedJaxpr) else x
        for x in leaves
        if isinstance(x, Jaxpr | ClosedJaxpr)
    ]


def peak_flops(kind: str) -> float | None:
    """Returns the peak bfloat16 FLOPs per second of a `jax.Device.device_kind`, against which
    MFU is measured whatever the compute dtype; None for an unknown device.
    """
    return next((peak for pattern, peak in PEAKS if re.fullmatch(pattern, kind)), None)
