"""Flat names: there and back, through NNX modules with long lists and through stacks."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from flamingo_jax.pytrees import from_flat, leaf_name, stack_axes, stacked_name, to_flat


class Leaf(nnx.Module):
    def __init__(self, value: float):
        self.w = nnx.Param(jnp.full((2,), value))


class Tree(nnx.Module):
    """Twelve modules in a list: as strings their places would sort as 0, 1, 10, 11, 2."""

    def __init__(self) -> None:
        self.blocks = nnx.List([Leaf(float(i)) for i in range(12)])
        self.scale = nnx.Param(jnp.ones(()))


def test_a_module_with_a_long_list_survives_the_way_through_flat_names() -> None:
    graph, state = nnx.split(Tree())
    flat = to_flat(state)
    assert list(flat)[:2] == ["blocks/0/w", "blocks/1/w"] and list(flat)[-1] == "scale"
    shuffled = {name: flat[name] for name in sorted(flat, reverse=True)}
    merged = nnx.merge(graph, nnx.State(from_flat(shuffled)))
    assert [float(block.w[0]) for block in merged.blocks] == list(range(12))
    zeros = jax.tree.map(jnp.zeros_like, state)
    nnx.replace_by_pure_dict(zeros, from_flat(shuffled))
    assert [float(block.w[0]) for block in nnx.merge(graph, zeros).blocks] == list(range(12))


def test_values_are_raw_arrays_for_states_variables_tracers_and_shapes() -> None:
    _, state = nnx.split(Tree())
    assert all(type(value) is type(jnp.ones(1)) for value in to_flat(state).values())
    assert isinstance(to_flat({"a": nnx.Param(jnp.ones(3))})["a"], jax.Array)
    shapes = to_flat(jax.eval_shape(lambda: nnx.split(Tree())[1]))
    assert shapes["blocks/3/w"].shape == (2,)
    assert jax.jit(lambda s: to_flat(s)["blocks/5/w"])(state)[0] == 5


def test_nested_dicts_come_back_equal() -> None:
    nested = {"a": {"b": 1, "c": {0: 2, 10: 3}}, "d": 4}
    assert to_flat(nested) == {"a/b": 1, "a/c/0": 2, "a/c/10": 3, "d": 4}
    assert from_flat(to_flat(nested)) == nested


def test_a_layers_name_is_that_of_its_stack_and_its_number() -> None:
    for name, index, leaf in (
        ("a/layers/b/3", (12,), "a/layers/12/b/3"),
        ("enc/layers/layers/w", (1, 2), "enc/layers/1/layers/2/w"),
        ("a/b", (), "a/b"),
    ):
        assert leaf_name(name, index) == leaf and stacked_name(leaf) == (name, index)
        assert stack_axes(name) == len(index)
    with pytest.raises(ValueError, match="number should follow"):
        stacked_name("layers/w")


def test_conflicting_names_are_refused() -> None:
    with pytest.raises(ValueError, match="both"):
        from_flat({"a": 1, "a/b": 2})
    with pytest.raises(ValueError, match="both"):
        from_flat({"a/b": 2, "a": 1})
    with pytest.raises(ValueError, match="separates"):
        to_flat({"a/b": 1})
