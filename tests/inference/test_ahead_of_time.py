"""Inference compiled for a mesh from shapes alone, against what a loaded model holds."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flamingo_jax as fj
from flamingo_jax.inference.ahead_of_time import InferenceSize, abstract_parameters, compile_steps
from flamingo_jax.inference.placement import bytes_per_device
from flamingo_jax.pytrees import to_flat
from tests.inference.meshes import model_of_eight_heads

CONFIG = model_of_eight_heads().config
SIZE = InferenceSize(rows=8, prompt_tokens=32, new_tokens=16, visuals=2)


def held(arrays: Any) -> tuple[int, int]:
    """Bytes of arrays in all, and on one device."""
    leaves = jax.tree.leaves(arrays)
    return (
        sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves),
        sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves),
    )


def test_the_cache_is_sharded_by_rows_and_heads_and_updated_in_place() -> None:
    mesh = fj.make_mesh("data=2,fsdp=2,model=2")
    steps = compile_steps(
        CONFIG, mesh, SIZE, lambda traced: traced.lower().compile(), jnp.float32, encoder=False
    )
    assert list(steps) == ["prepare", "prefill", "decode"]
    memory = steps["decode"].compiled.memory_analysis()
    assert memory is not None
    _, _, cache, rows = steps["decode"].arguments
    whole, on_one = held(cache)
    # Over 4 row shards and 2 of the heads, but for the distances' keys, which all rows share.
    lm = CONFIG.language_model
    slots, heads = SIZE.prompt_tokens + SIZE.new_tokens, lm.attention.heads * 4
    keys_and_values = 2 * lm.layers * SIZE.rows * slots * heads * 4
    distances = lm.layers * slots * heads * 4
    assert whole == keys_and_values + distances
    assert on_one <= keys_and_values // 8 + distances
    # Donated: the new cache takes no further memory.
    assert memory.alias_size_in_bytes >= keys_and_values // 8
    parameters = abstract_parameters(CONFIG, mesh, jnp.float32)[1]
    taken = held(parameters)[1] + on_one + held(rows)[1]
    # Programs lack the parameters that they do not use: the encoder and the resampler.
    assert memory.argument_size_in_bytes < taken + 1000


def test_abstract_parameters_are_those_of_a_loaded_model() -> None:
    mesh = fj.make_mesh("fsdp=4,model=2")
    _, parameters = abstract_parameters(CONFIG, mesh, jnp.bfloat16)
    real = to_flat(nnx.split(model_of_eight_heads().model)[1])
    assert {name: p.shape for name, p in parameters.items()} == {
        name: p.shape for name, p in real.items()
    }
    assert parameters["language_model/embedding"].dtype == jnp.bfloat16
    assert parameters["gated_xattn/layers/query"].dtype == jnp.float32
    shardings = {name: p.sharding for name, p in parameters.items()}
    assert bytes_per_device(parameters, shardings) == held(parameters)[1]


def test_rows_that_do_not_divide_are_refused() -> None:
    mesh = fj.make_mesh("data=8")
    with pytest.raises(fj.UserError, match="12 rows do not divide over the 8 row shards"):
        compile_steps(CONFIG, mesh, SIZE._replace(rows=12), lambda traced: traced.lower().compile())
