"""Model FLOPs: what the products of a step need, for model FLOPs utilisation (MFU = model FLOPs
/ (seconds * peak of the devices)).

A multiplication and its addition are two. For each vector that a weight meets, a trained weight
costs 6 (forward, and the gradients of its input and of itself), a frozen one behind trained
ones 4 (no gradient of itself), the first trained one behind frozen ones 4 (none of its input),
and a frozen one before all trained ones 2. Only real tokens, visuals and frames meet weights
here. Attention's products of activations with each other, padding, whatever is computed twice
to save memory, and the optimizer count nothing, so that MFU errs low.
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
from flamingo_jax.weight_parts import is_update, meets, weight_name

PEAKS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite|TPU v5e", 197e12),
    ("TPU v5|TPU v5p", 459e12),
    ("TPU v6 lite|TPU v6e", 918e12),
    (r"NVIDIA (H100 \d+GB HBM3|G?H200.*)", 989e12),
    ("NVIDIA A100.*", 312e12),
)
"""Regular expressions over a device's kind -> dense bfloat16 FLOPs a second, as the makers
publish them.
"""

_LAYER = "layers/(attention/)?(query|key|value|out)|layers/feed_forward/(gate|up|down)"


class Work(NamedTuple):
    """What is real in a batch."""

    tokens: int = 0
    looking_tokens: int = 0
    """Those of datasets with visuals, which the gated blocks' attention is computed for."""
    visuals: int = 0
    """Pairs in the contrastive stage."""
    frames: int = 0


class Cost(NamedTuple):
    """FLOPs of an update for one of each; the fields are those of `Work`."""

    token: int = 0
    looking_token: int = 0
    visual: int = 0
    frame: int = 0

    def of(self, work: Work) -> int:
        """FLOPs for all of the work."""
        return sum(cost * count for cost, count in zip(self, work, strict=True))


def work_in(batches: Iterable[Mapping[str, Any]]) -> Work:
    """Counts the real work in any task's batches, of numpy or traced jax arrays; each count is
    of the same kind as the arrays.
    """
    works = [_work_in(batch) for batch in batches]
    return Work(*(sum(counts) for counts in zip(*works, strict=True)))


def _work_in(batch: Mapping[str, Any]) -> Work:
    if "mask" in batch:
        pairs = batch["mask"].any(1).sum()
        return Work(batch["mask"].sum(), 0, pairs, pairs)
    tokens = (batch["segments"] > 0).sum()
    if "frame_mask" not in batch:
        return Work(tokens)
    return Work(tokens, tokens, batch["frame_mask"].any(1).sum(), batch["frame_mask"].sum())


def computed_tokens(batches: Iterable[Mapping[str, Any]]) -> int:
    """Counts the tokens that the batches have room for: all that are computed, padding too."""
    return sum(batch["tokens"].size for batch in batches)


def step_cost(experiment: Experiment) -> Cost:
    """What the experiment's update costs, from the real modules traced abstractly."""
    model: Any = nnx.eval_shape(
        lambda: stages.build_model(experiment, nnx.Rngs(params=jax.random.key(0)))
    )
    sizes = {name: math.prod(shape.shape) for name, shape in to_flat(nnx.state(model)).items()}

    updated = any(map(is_update, sizes))

    def named(pattern: str, prefix: str = "") -> dict[str, int]:
        return {
            name: size
            for name, size in sizes.items()
            if re.fullmatch(f"{prefix}({pattern})", weight_name(name)) and meets(name)
        }

    def weights(pattern: str, prefix: str = "") -> int:
        return sum(named(pattern, prefix).values())

    def language_model(prefix: str, each: int) -> int:
        """FLOPs a token at `each` for a weight; of one that is trained by updates it is frozen,
        behind trained ones.
        """
        head = "embedding" if f"{prefix}head" not in sizes else "head"
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
    # What layers meet: the perceiver's latents all of them, its cells keys and values alone;
    # the transformer's latents and cells all; the MLP's cells all, and its map every channel.
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
    """FLOPs forward of a vision encoder for one image, and the cells of its grid.

    `encoder` may hold shapes for arrays.
    """
    graph, state = nnx.split(encoder)
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    jaxpr, grid = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x), return_shape=True)(
        state, image
    )
    return product_flops(jaxpr.jaxpr), math.prod(grid.shape[1:3])


def product_flops(jaxpr: Jaxpr) -> int:
    """FLOPs of the matrix products and (forward) convolutions in a traced function. A scan's
    body counts as often as it runs, where the compiler's own analysis counts it once; a `while`
    and each branch of a `cond` count once.
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
    leaves = jax.tree.leaves(dict(parameters), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr))
    return [
        x.jaxpr if isinstance(x, ClosedJaxpr) else x
        for x in leaves
        if isinstance(x, Jaxpr | ClosedJaxpr)
    ]


def peak_flops(kind: str) -> float | None:
    """Bfloat16 FLOPs a second of a device (`jax.Device.device_kind`), the yardstick whatever
    type is computed in; None where not known.
    """
    return next((peak for pattern, peak in PEAKS if re.fullmatch(pattern, kind)), None)
