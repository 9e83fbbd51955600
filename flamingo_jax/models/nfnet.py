"""Normalizer-Free ResNets (NFNet, Brock et al. 2021), F0 to F7 and a tiny one. The paper's
vision encoder is F6 without its classifier.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import VisionConfig
from flamingo_jax.models import ops
from flamingo_jax.models.int8 import Int8Filters
from flamingo_jax.models.layers import broadcast_param, linear, scan_layers, stack, standardise

Array = jax.Array

GELU_GAIN = 1.7015043497085571
"""Scales GELU so that normal input of variance 1 gives output of variance 1."""
ALPHA = 0.2
"""The scale of residual branches; a block's variance grows by ALPHA^2."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """The sizes of a network: stem convolutions, then stages of bottleneck blocks.

    bottleneck, squeeze: hidden channels of a block, and of its squeeze-and-excite, per output
      channel.
    """

    stem_widths: tuple[int, ...]
    stem_strides: tuple[int, ...]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    strides: tuple[int, ...]
    group_width: int
    final_width: int
    bottleneck: float = 0.5
    squeeze: float = 0.5

    @property
    def stride(self) -> int:
        """Side of a grid cell in pixels."""
        return math.prod(self.stem_strides) * math.prod(self.strides)


def _family(scale: int) -> Variant:
    """Makes NFNet-F(scale - 1), whose stages are `scale` times as deep as F0's."""
    widths = (256, 512, 1536, 1536)
    depths = tuple(scale * d for d in (1, 2, 6, 3))
    return Variant(
        (16, 32, 64, 128), (2, 1, 1, 2), widths, depths, (1, 2, 2, 2), 128, 2 * widths[-1]
    )


VARIANTS: dict[str, Variant] = {f"F{n}": _family(n + 1) for n in range(8)} | {
    # Total stride 8 and no groups: what 48 px images and two CPU cores want.
    "tiny": Variant((16, 48), (2, 2), (64, 128), (2, 2), (1, 2), 1024, 160)
}


def variant_of(config: VisionConfig) -> Variant:
    """Returns the variant that `config.variant` names.

    Raises: UserError for an unknown name.
    """
    if config.variant not in VARIANTS:
        raise UserError(
            f"vision.variant is {config.variant!r}, but NFNet has {', '.join(VARIANTS)}: choose"
            " one of them"
        )
    return VARIANTS[config.variant]


def activation(x: Array) -> Array:
    """Applies GELU, scaled so that the variance of a normal input stays 1."""
    return jax.nn.gelu(x) * GELU_GAIN


def convolution(x: Array, w: Array, stride: int, groups: int) -> Array:
    """Convolves x [M, H, W, I] with w [h, w, I / groups, O] -> [M, H / stride, W / stride, O],
    in the dtype of `x`; the gradient of `w` is accumulated in the dtype of `w`, as in
    `layers.linear`.
    """
    return (
        _convolve(x, w, stride, groups)
        if w.dtype == x.dtype
        else _cast_convolve(x, w, stride, groups)
    )


def _convolve(x: Array, w: Array, stride: int, groups: int) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        w.astype(x.dtype),
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _cast_convolve(x: Array, w: Array, stride: int, groups: int) -> Array:
    return _convolve(x, w, stride, groups)


def _cast_forward(
    x: Array, w: Array, stride: int, groups: int
) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, w, stride, groups), (x, w)


def _cast_backward(
    stride: int, groups: int, given: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, w = given
    (dx,) = jax.linear_transpose(lambda x: _convolve(x, w, stride, groups), x)(dy)
    # The gradient of w is a convolution of x with dy, dilated by the stride. JAX's own would
    # have the dtype of the activations.
    low = [
        before
        for before, _ in jax.lax.padtype_to_pads(
            x.shape[1:3], w.shape[:2], (stride, stride), "SAME"
        )
    ]
    # Padding at the end so that exactly the filter's h x w offsets are computed.
    high = [
        stride * (o - 1) + k - size - before
        for o, k, size, before in zip(dy.shape[1:3], w.shape[:2], x.shape[1:3], low, strict=True)
    ]
    dw = jax.lax.conv_general_dilated(
        ops.conv_operand(x, w.dtype),
        ops.conv_operand(dy, w.dtype),
        (1, 1),
        list(zip(low, high, strict=True)),
        rhs_dilation=(stride, stride),
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        batch_group_count=groups,
        preferred_element_type=w.dtype,
    )
    return dx, dw


_cast_convolve.defvjp(_cast_forward, _cast_backward)


class WSConv(nnx.Module):
    """Convolution with scaled weight standardisation (Brock et al. 2021): each filter is
    normalised to mean 0 and variance gain^2 / fan-in.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        rngs: nnx.Rngs,
    ):
        self.stride, self.groups = stride, groups
        # Whether `weight` is already standardised: see NFNet.prepared.
        self.ready = False
        fan_in = size * size * inputs // groups
        self.weight: Any = nnx.Param(
            jax.random.normal(rngs.params(), (size, size, inputs // groups, outputs))
            / math.sqrt(fan_in)
        )
        self.gain = nnx.Param(jnp.ones((outputs,)))
        self.bias = nnx.Param(jnp.zeros((outputs,)))

    def standardised(self, dtype: DTypeLike) -> Array:
        """Returns the standardised weights [..., size, size, inputs / groups, outputs]; a
        stack of layers has leading axes.
        """
        if self.ready:
            return self.weight[...]
        return standardise(self.weight[...], self.gain[...]).astype(dtype)

    def __call__(self, x: Array) -> Array:
        """Convolves [M, H, W, inputs] -> [M, H / stride, W / stride, outputs]."""
        scale: Array | None = None
        if isinstance(self.weight, Int8Filters):
            # Frozen: no gradient of the filters.
            w = jax.lax.stop_gradient(self.weight.int8[...].astype(x.dtype))
            scale = self.weight.int8_filter_scale[...] * self.gain[...].astype(jnp.float32)
        else:
            # `linear` and `convolution` cast to the activations' dtype.
            w = self.standardised(self.weight[...].dtype)
        if w.shape[:2] == (1, 1) and self.stride == 1:
            # A matrix product is five times faster than a 1x1 convolution on CPU.
            x = linear(x, w[0, 0])
        else:
            x = convolution(x, w, self.stride, self.groups)
        x = x if scale is None else (x * scale).astype(x.dtype)
        return x + broadcast_param(self.bias[...], x)


class SqueezeExcite(nnx.Module):
    """Squeeze-and-excite (Hu et al. 2018): a gate per channel, computed from the channels'
    means over the grid.
    """

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        down = jax.random.normal(rngs.params(), (width, hidden)) / math.sqrt(width)
        up = jax.random.normal(rngs.params(), (hidden, width)) / math.sqrt(hidden)
        self.down, self.down_bias = nnx.Param(down), nnx.Param(jnp.zeros((hidden,)))
        self.up, self.up_bias = nnx.Param(up), nnx.Param(jnp.zeros((width,)))

    def __call__(self, x: Array) -> Array:
        """Computes the gates, 0 .. 1: [M, h, w, C] -> [M, 1, 1, C]."""
        h = x.mean((1, 2))
        h = linear(h, self.down)
        h = jax.nn.relu(h + broadcast_param(self.down_bias[...], h))
        h = linear(h, self.up)
        return jax.nn.sigmoid(h + broadcast_param(self.up_bias[...], h))[:, None, None]


class Block(nnx.Module):
    """A bottleneck residual block with two grouped 3x3 convolutions and squeeze-and-excite:
    x + ALPHA * skip_gain * branch(beta * GELU(x)). A transition block also strides and widens.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        transition: bool,
        shape: Variant,
        *,
        rngs: nnx.Rngs,
    ):
        groups = max(int(outputs * shape.bottleneck) // shape.group_width, 1)
        width = (
            groups * shape.group_width
            if outputs * shape.bottleneck >= shape.group_width
            else int(outputs * shape.bottleneck)
        )
        self.stride = stride
        self.reduce = WSConv(inputs, width, 1, rngs=rngs)
        self.first = WSConv(width, width, 3, stride=stride, groups=groups, rngs=rngs)
        self.second = WSConv(width, width, 3, groups=groups, rngs=rngs)
        self.expand = WSConv(width, outputs, 1, rngs=rngs)
        self.shortcut = WSConv(inputs, outputs, 1, rngs=rngs) if transition else None
        self.squeeze_excite = SqueezeExcite(outputs, int(outputs * shape.squeeze), rngs=rngs)
        self.skip_gain = nnx.Param(jnp.zeros(()))

    def __call__(self, x: Array, beta: Array | float, keep: Array | None = None) -> Array:
        """Runs the block on x [M, h, w, inputs] -> [M, h / stride, w / stride, outputs].

        Args:
          beta: 1 / the expected standard deviation of x at this depth.
          keep: bool [M], False where stochastic depth drops the branch; None keeps all.
        """
        out = activation(x) * jnp.asarray(beta, x.dtype)
        skip = x
        if self.shortcut is not None:
            skip = self.shortcut(_average_pool(out) if self.stride > 1 else out)
        h = activation(self.reduce(out))
        h = activation(self.second(activation(self.first(h))))
        h = self.expand(h)
        # Times 2, since a sigmoid gate is 1/2 on average.
        h = h * self.squeeze_excite(h) * 2
        if keep is not None:
            h = jnp.where(keep[:, None, None, None], h, jnp.zeros((), h.dtype))
        return h * broadcast_param(self.skip_gain[...] * ALPHA, h) + skip


def _average_pool(x: Array) -> Array:
    """Averages 2x2 windows at stride 2; a window at an odd border averages the cells it has."""
    return _sum_2x2(x) / _sum_2x2(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


def _sum_2x2(x: Array) -> Array:
    zero, window = np.zeros((), x.dtype), (1, 2, 2, 1)
    return jax.lax.reduce_window(x, zero, jax.lax.add, window, window, "SAME")


class Stage(nnx.Module):
    """A transition block, then a scanned stack of equal blocks."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        depth: int,
        stride: int,
        shape: Variant,
        *,
        rngs: nnx.Rngs,
    ):
        self.depth = depth
        self.transition = Block(inputs, outputs, stride, True, shape, rngs=rngs)
        self.layers = (
            stack(lambda r: Block(outputs, outputs, 1, False, shape, rngs=r), depth - 1, rngs)
            if depth > 1
            else None
        )

    def __call__(self, x: Array, beta: float, keep: Array | None) -> Array:
        """Runs the stage on x [M, h, w, inputs]. keep: bool [depth, M], see Block; or None."""
        x = self.transition(x, beta, None if keep is None else keep[0])
        if self.layers is None:
            return x
        # The expected variance is 1 after the transition and grows by ALPHA^2 a block.
        betas = jnp.asarray([1 / math.sqrt(1 + ALPHA**2 * place) for place in range(1, self.depth)])
        inputs = (betas, None if keep is None else keep[1:])
        return scan_layers(
            self.layers, lambda block, h, given: (block(h, *given), None), x, inputs
        )[0]


class NFNet(nnx.Module):
    """Encodes normalised images [M, H, W, 3] to grid features [M, h, w, C], the output of the
    final 1x1 convolution (F6: stride 32, C = 3072).
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        shape = variant_of(config)
        self.stochastic_depth, self.depths = config.stochastic_depth, shape.depths
        widths = (3, *shape.stem_widths)
        self.stem = nnx.List(
            [
                WSConv(widths[i], widths[i + 1], 3, stride=s, rngs=rngs)
                for i, s in enumerate(shape.stem_strides)
            ]
        )
        ends = (shape.stem_widths[-1], *shape.widths)
        self.stages = nnx.List(
            [
                Stage(ends[i], ends[i + 1], d, s, shape, rngs=rngs)
                for i, (d, s) in enumerate(zip(shape.depths, shape.strides, strict=True))
            ]
        )
        self.final = WSConv(shape.widths[-1], shape.final_width, 1, rngs=rngs)
        self.width = shape.final_width
        self.grid = -(-config.image_size // shape.stride)

    def __call__(self, images: Array, *, train: bool = False, key: Array | None = None) -> Array:
        """Encodes images [M, H, W, 3] -> [M, h, w, C]. key: randomness of stochastic depth in
        training; without it, or at rate 0, no branch is dropped.
        """
        x = images
        for place, conv in enumerate(self.stem):
            x = conv(x if place == 0 else activation(x))
        blocks, done, deviation = sum(self.depths), 0, 1.0
        for place, stage in enumerate(self.stages):
            keep = None
            if train and key is not None and self.stochastic_depth > 0:
                # The drop rate grows linearly with depth.
                rates = self.stochastic_depth * (done + np.arange(stage.depth)) / blocks
                keep = (
                    jax.random.uniform(jax.random.fold_in(key, place), (stage.depth, x.shape[0]))
                    >= rates[:, None]
                )
            x = stage(x, 1 / deviation, keep)
            deviation = math.sqrt(1 + ALPHA**2 * stage.depth)
            done += stage.depth
        return activation(self.final(x))

    def prepared(self, dtype: DTypeLike) -> "NFNet":
        """Returns a copy whose weights are already standardised and cast to `dtype`, so that
        encoding many batches does so once.
        """
        copy = nnx.merge(*nnx.split(self))
        for _, module in nnx.iter_modules(copy):
            # Integers are standardised already, and converted a layer at a time.
            if isinstance(module, WSConv) and isinstance(module.weight, nnx.Param):
                module.weight = nnx.Param(module.standardised(dtype))
                module.ready = True
        return copy
