"""A stream is its parts, whatever the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flamingo_jax.experiment import MeshConfig
from flamingo_jax.models.stream import join, shapes_of, split
from flamingo_jax.partitioning.constraints import constrain, residual, row_shards
from flamingo_jax.partitioning.mesh import ROWS, batch_sharding, make_mesh

PARTS = [np.arange(8 * 6 * 2, dtype=np.float32).reshape(8, 6, 2), -np.arange(16 * 3 * 2, dtype=np.float32).reshape(16, 3, 2)]


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 2, 2), (8, 1, 1)])
def test_split_undoes_join_and_nothing_crosses_devices(shape: tuple[int, int, int]) -> None:
    mesh = make_mesh(MeshConfig(*shape))
    with jax.set_mesh(mesh):
        assert row_shards() == shape[0] * shape[1]
        there_and_back = jax.jit(lambda *parts: (stream := residual(join(parts)), split(stream, shapes_of(parts))))
        parts = jax.device_put(PARTS, batch_sharding(mesh))
        stream, found = there_and_back(*parts)
        assert stream.shape == (row_shards(), 96 // row_shards(), 2)
        for part, again in zip(PARTS, found, strict=True):
            np.testing.assert_array_equal(part, again)
        # Row shard s holds its rows of each part, dataset after dataset.
        np.testing.assert_array_equal(stream[-1, :6], PARTS[0][8 - 8 // row_shards()])
        if shape[2] == 1:
            assert not any(kind in there_and_back.lower(*parts).compile().as_text() for kind in ("all-gather", "all-to-all", "collective-permute"))


def test_one_part_is_left_as_it_is_without_a_mesh() -> None:
    assert row_shards() == 1
    assert join([PARTS[0]]) is PARTS[0]
    assert split(PARTS[0], [(8, 6)])[0] is PARTS[0]
    assert join([jnp.asarray(part) for part in PARTS]).shape == (1, 96, 2)


def test_axes_that_do_not_divide_are_left_whole() -> None:
    mesh = make_mesh(MeshConfig(2, 1, 4))
    with jax.set_mesh(mesh):
        x = jax.jit(lambda x: constrain(x, ROWS, "model"))(jnp.zeros((4, 6)))
        assert x.sharding.shard_shape(x.shape) == (2, 6)
