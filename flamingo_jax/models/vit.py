"""Vision Transformer as in CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023): for open
checkpoints, and for the paper's ablation of the vision encoder.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import VisionConfig, ViTConfig
from flamingo_jax.models.attention import FullAttention
from flamingo_jax.models.layers import (
    FeedForward,
    LayerNorm,
    broadcast_param,
    fan_in_normal,
    linear,
    scan_layers,
    stack,
)

Array = jax.Array


class ViTLayer(nnx.Module):
    """A pre-norm layer: x += Attention(Norm(x)); x += FeedForward(Norm(x))."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(config.width, config.norm_eps)
        self.attention = FullAttention(config.width, config.heads, rngs=rngs)
        self.feed_forward_norm = LayerNorm(config.width, config.norm_eps)
        self.feed_forward = FeedForward(
            config.width, config.feed_forward, config.activation, bias=True, rngs=rngs
        )

    def __call__(self, x: Array) -> Array:
        """Runs the layer on [M, L, C] -> [M, L, C]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class ViT(nnx.Module):
    """Encodes normalised images [M, H, W, 3] to grid features [M, H / patch, W / patch, C]:
    the patches' last states, without the class token.

    For images of another size than the config's, position embeddings are interpolated. Pixels
    on the right and at the bottom that do not fill a patch are dropped (SigLIP: 384 pixels are
    27 patches of 14).
    Raises: UserError where an image is smaller than a patch.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        assert config.vit is not None
        vit = self.config = config.vit
        self.grid = _cells(config.image_size, vit.patch_size)
        self.width = vit.width
        self.patch_embedding = fan_in_normal(rngs, (3 * vit.patch_size**2, vit.width))
        self.patch_bias = nnx.Param(jnp.zeros((vit.width,))) if vit.patch_bias else None
        self.position_embedding = _embedding(rngs, self.grid, self.grid, vit.width)
        self.class_embedding = _embedding(rngs, vit.width) if vit.class_token else None
        self.first_norm = LayerNorm(vit.width, vit.norm_eps) if vit.first_norm else None
        self.layers = stack(lambda r: ViTLayer(vit, rngs=r), vit.layers, rngs)
        self.last_norm = LayerNorm(vit.width, vit.norm_eps) if vit.last_norm else None

    def __call__(self, images: Array, *, train: bool = False, key: Array | None = None) -> Array:
        """Encodes images [M, H, W, 3] -> [M, h, w, C]. `train` and `key` are those of NFNet's
        interface: nothing is random here.
        """
        patch = self.config.patch_size
        count, rows, columns = (
            images.shape[0],
            _cells(images.shape[1], patch),
            _cells(images.shape[2], patch),
        )
        x = images[:, : rows * patch, : columns * patch]
        # [M, H, W, 3] -> patches [M, rows, columns, patch * patch * 3]
        x = (
            x.reshape(count, rows, patch, columns, patch, 3)
            .swapaxes(2, 3)
            .reshape(count, rows, columns, -1)
        )
        x = linear(x, self.patch_embedding)
        if self.patch_bias is not None:
            x = x + broadcast_param(self.patch_bias[...], x)
        # [M, rows, columns, C] -> [M, L, C], and the class token in front.
        x = (x + broadcast_param(self._positions(rows, columns), x)).reshape(
            count, rows * columns, self.width
        )
        if self.class_embedding is not None:
            first = jnp.broadcast_to(self.class_embedding[...], (count, 1, self.width)).astype(
                x.dtype
            )
            x = jnp.concatenate([first, x], axis=1)
        if self.first_norm is not None:
            x = self.first_norm(x)
        x, _ = scan_layers(self.layers, lambda layer, h, _: (layer(h), None), x)
        if self.class_embedding is not None:
            x = x[:, 1:]
        if self.last_norm is not None:
            x = self.last_norm(x)
        return x.reshape(count, rows, columns, self.width)

    def prepared(self, dtype: DTypeLike) -> "ViT":
        """Returns itself: a ViT has nothing to precompute, unlike NFNet's weights."""
        return self

    def _positions(self, rows: int, columns: int) -> Array:
        return resize_positions(self.position_embedding[...], rows, columns)


def _embedding(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))


def resize_positions(table: Array, rows: int, columns: int) -> Array:
    """Interpolates learned position embeddings [r, s, C] -> [rows, columns, C], float32 unless
    the grid is the table's own.

    It equals what published encoders do at other image sizes (transformers'
    `interpolate_pos_encoding`, torch's `interpolate(mode="bicubic", align_corners=False)`):
    cubic convolution (Keys 1981) with the coefficient -0.75, borders repeated, no antialiasing
    when the grid becomes coarser. `jax.image.resize` has -0.5 and antialiases, which changes
    the embeddings by a percent or more.
    """
    if table.shape[:2] == (rows, columns):
        return table
    down, across = (
        jnp.asarray(_cubic(size, wanted), jnp.float32)
        for size, wanted in zip(table.shape, (rows, columns), strict=False)
    )
    # "highest": TPUs would otherwise round the operands of float32 products to bfloat16.
    return jnp.einsum(
        "ir,jc,rcw->ijw", down, across, table.astype(jnp.float32), precision="highest"
    )


def _cubic(size: int, wanted: int, a: float = -0.75) -> np.ndarray:
    """Makes the matrix of cubic interpolation from `size` to `wanted` points: float64
    [wanted, size]. a: the coefficient of Keys 1981.
    """
    # Centres of the wanted points, in coordinates of the given ones.
    places = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    first = np.floor(places).astype(int)
    weights = np.zeros((wanted, size))
    for step in (-1, 0, 1, 2):
        x = np.abs(places - first - step)
        near = ((a + 2) * x - (a + 3)) * x**2 + 1
        far = a * (((x - 5) * x + 8) * x - 4)
        target = np.clip(first + step, 0, size - 1)
        np.add.at(weights, (np.arange(wanted), target), np.where(x <= 1, near, far))
    return weights


def _cells(size: int, patch: int) -> int:
    """Returns how many whole patches fit into `size` pixels."""
    if size < patch:
        raise UserError(
            f"vision.image_size is {size}, which is less than a patch of {patch}: make it a"
            " multiple of vision.vit.patch_size"
        )
    return size // patch
