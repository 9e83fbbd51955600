"""Weights made of several arrays: low-rank updates (LoRA), and int8 with scales (`models.int8`).
They take the place of an nnx.Param, and `layers.linear` multiplies activations with either.

To add a kind: a module with the methods of `layers.Weight`, and a row for each of its arrays
in `flamingo_jax.weight_parts`. Sharding, freezing, checkpoints and FLOPs follow from these.
"""

import math
import re

import jax
import jax.numpy as jnp
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.models.int8 import Int8Filters, Int8Table, Int8Weight
from flamingo_jax.models.language_model_config import LoRAConfig
from flamingo_jax.models.layers import Weight, fan_in_normal, linear

Array = jax.Array

INPUT_AXES = {
    "attention/query": 1,
    "attention/key": 1,
    "attention/value": 1,
    "attention/out": 2,
    "feed_forward/gate": 1,
    "feed_forward/up": 1,
    "feed_forward/down": 1,
}
"""The matrices of a decoder layer, and how many of their leading axes are inputs."""


class LoRAWeight(nnx.Module):
    """A frozen matrix with a trained low-rank update (LoRA, Hu et al. 2021):
    base + alpha / rank * lora_down @ lora_up, where lora_up is initially zero.

    Args:
      base: [inputs..., outputs...], or a stack of them with leading layer axes.
      inputs: how many axes are inputs.
      stacked: how many leading axes are layers.
    """

    def __init__(
        self,
        base: nnx.Param | Weight,
        inputs: int,
        config: LoRAConfig,
        *,
        stacked: int = 0,
        rngs: nnx.Rngs,
    ):
        lead, ins = base.shape[:stacked], base.shape[stacked : stacked + inputs]
        outs = base.shape[stacked + inputs :]
        self.base = base
        self.lora_down = fan_in_normal(rngs, (*lead, *ins, config.rank), math.prod(ins))
        self.lora_up = nnx.Param(jnp.zeros((*lead, config.rank, *outs)))
        self.inputs = inputs
        self.scale = config.alpha / config.rank

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def product(self, x: Array, contract: int) -> Array:
        """Computes `linear` without forming the dense matrix: x [..., inputs] -> [...,
        outputs] in the dtype of `x`.
        """
        low = linear(x, self.lora_down, contract)
        return linear(x, self.base, contract) + self.scale * linear(low, self.lora_up)

    def dense(self) -> Array:
        """Merges base and update into one matrix in the base's dtype, summed in float32."""
        return merge_lora(
            dense(self.base), self.lora_down[...], self.lora_up[...], self.scale, self.inputs
        )


def merge_lora(base: Array, down: Array, up: Array, scale: float, inputs: int) -> Array:
    """Adds a low-rank update to a matrix, base + scale * down @ up, in the base's dtype, summed
    in float32.

    base: [layers..., inputs..., outputs...] with `inputs` axes of inputs. down: [layers...,
    inputs..., rank]. up: [layers..., rank, outputs...].
    """
    down, up = down.astype(jnp.float32), up.astype(jnp.float32)
    lead, rank = down.shape[: down.ndim - inputs - 1], down.shape[-1]
    # [layers..., inputs, rank] @ [layers..., rank, outputs]
    down, up = down.reshape(*lead, -1, rank), up.reshape(*lead, rank, -1)
    update = jnp.matmul(down, up, precision="highest").reshape(base.shape)
    return (base.astype(jnp.float32) + scale * update).astype(base.dtype)


def dense(weight: nnx.Param | Weight) -> Array:
    """Returns a weight as one dense array."""
    return weight[...] if isinstance(weight, nnx.Variable) else weight.dense()


def add_lora(layers: nnx.Module, config: LoRAConfig, rngs: nnx.Rngs) -> None:
    """Replaces those matrices of a stack of decoder layers that match `config.targets` by
    LoRAWeights.

    Raises: UserError for a target that matches no matrix.
    """
    for pattern in config.targets:
        if not any(re.fullmatch(pattern, name) for name in INPUT_AXES):
            raise UserError(
                f"config.training.lora.targets has {pattern!r}, which names no matrix of a"
                f" decoder layer: they are {', '.join(INPUT_AXES)}"
            )
    for name, inputs in INPUT_AXES.items():
        half, attribute = name.split("/")
        module = getattr(layers, half)
        base = getattr(module, attribute)
        if base is not None and any(re.fullmatch(p, name) for p in config.targets):
            setattr(module, attribute, LoRAWeight(base, inputs, config, stacked=1, rngs=rngs))


def make_dense(model: nnx.Module) -> None:
    """Replaces every weight of several arrays in the model by one dense nnx.Param, as exports
    store them: LoRA updates are merged, int8 is dequantised.
    """
    for _, module in list(nnx.iter_modules(model)):
        for name, value in list(vars(module).items()):
            if isinstance(value, LoRAWeight | Int8Weight | Int8Table | Int8Filters):
                setattr(module, name, nnx.Param(value.dense()))
