"""A stream is its parts, whatever the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.experiment import (
    AttentionConfig,
    LanguageModelConfig,
    MeshConfig,
    PositionsConfig,
)
from flamingo_jax.models import attention, packing
from flamingo_jax.models.packing import (
    PackedText,
    Packing,
    block_length,
    block_segments,
    join,
    merge_alike,
    shapes_of,
    split,
)
from flamingo_jax.partitioning.constraints import constrain, residual, row_shards
from flamingo_jax.partitioning.mesh import ROWS, batch_shardings, make_mesh
from tests.rounding import assert_close

ATTENTION = 8 + 2 * 4 + 2 * 8 + 8
"""Terms of one attention over 8 values: projections, scores of content and of position, at most
8 keys and their values, the map out.
"""
PARTS = [
    np.arange(8 * 6 * 2, dtype=np.float32).reshape(8, 6, 2),
    -np.arange(16 * 3 * 2, dtype=np.float32).reshape(16, 3, 2),
]


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 2, 2), (8, 1, 1)])
def test_split_undoes_join_and_nothing_crosses_devices(shape: tuple[int, int, int]) -> None:
    mesh = make_mesh(MeshConfig(*shape))
    with jax.set_mesh(mesh):
        assert row_shards() == shape[0] * shape[1]
        there_and_back = jax.jit(
            lambda *parts: (stream := residual(join(parts)), split(stream, shapes_of(parts)))
        )
        parts = jax.device_put(PARTS, batch_shardings(["tokens"], mesh)["tokens"])
        stream, found = there_and_back(*parts)
        assert stream.shape == (row_shards(), 96 // row_shards(), 2)
        for part, again in zip(PARTS, found, strict=True):
            np.testing.assert_array_equal(part, again)
        # Row shard s holds its rows of each part, dataset after dataset.
        np.testing.assert_array_equal(stream[-1, :6], PARTS[0][8 - 8 // row_shards()])
        if shape[2] == 1:
            assert not any(
                kind in there_and_back.lower(*parts).compile().as_text()
                for kind in ("all-gather", "all-to-all", "collective-permute")
            )


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


@pytest.mark.parametrize(
    ("shapes", "length"),
    [
        ([(16, 256), (32, 32), (32, 64), (4, 64)], 256),
        ([(8, 64)], None),
        ([(8, 64), (8, 48)], None),
        ([(8, 64), (7, 32)], None),
        ([(1, 64), (64, 2)], None),
        ([(2, 2), (1, 64), (31, 2)], None),
    ],
)
def test_when_a_stream_is_cut_into_equal_blocks(
    shapes: list[tuple[int, int]], length: int | None
) -> None:
    """Not: a single part, a length that does not divide the longest, a rest, short rows for the
    most part, and a row across two blocks.
    """
    assert block_length(shapes) == length


@pytest.mark.parametrize("positions", ["transformer_xl", "rotary"])
@pytest.mark.parametrize("data", [1, 2])
def test_attention_by_blocks_is_attention_by_rows(
    positions: str, data: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LanguageModelConfig(
        width=8,
        attention=AttentionConfig(heads=2, head_width=4),
        positions=PositionsConfig(kind=positions),
    )
    module = attention.SelfAttention(config, out_scale=1.0, rngs=nnx.Rngs(0))
    draw = np.random.default_rng(0)
    shapes = [(4, 8), (8, 4), (4, 4), (8, 2)]
    segments = [np.sort(draw.integers(1, 3, shape), axis=1) for shape in shapes]
    segments[0][1, 5:] = segments[2][0, 3:] = segments[3][5] = 0
    places = [np.broadcast_to(np.arange(length), (rows, length)) for rows, length in shapes]
    mesh = make_mesh(MeshConfig(data, 1, 1), jax.devices()[:data])
    with jax.set_mesh(mesh):
        x = jnp.asarray(draw.normal(size=(data, 96 // data, 8)), jnp.float32)
        taken = []

        def run(x: jax.Array, segments: list[jax.Array]) -> jax.Array:
            monkeypatch.setattr(
                packing,
                "block_length",
                lambda shapes: taken.append(by_blocks and block_length(shapes)) or taken[-1],
            )
            positions = join([jnp.asarray(p) for p in places])
            return module(x, positions, Packing(tuple(segments)), None)[0]

        for by_blocks in (True, False):
            value, gradient = jax.jit(
                jax.value_and_grad(
                    lambda x: jnp.square(run(x, [jnp.asarray(s) for s in segments])).sum()
                )
            )(x)
            if by_blocks:
                expected = value, gradient
    assert taken == [8, False]
    # The sum over 128 tokens of 8 squares, behind one attention.
    assert_close(value, expected[0], terms=128 * 8 + 2 * ATTENTION)
    assert_close(gradient, expected[1], terms=2 * ATTENTION)


@pytest.mark.parametrize("shapes", [[(512, 2048)] * 3, [(4096, 1024), (8192, 512), (65536, 32)]])
def test_segments_of_the_largest_batches_keep_numbers_of_their_own(
    shapes: list[tuple[int, int]],
) -> None:
    """Two segments a row, of which the first row's second is padding."""
    parts = [
        np.broadcast_to(1 + 2 * np.arange(length) // length, (rows, length))
        for rows, length in shapes
    ]
    parts[0] = np.where((np.arange(len(parts[0])) == 0)[:, None] & (parts[0] == 2), 0, parts[0])
    found = np.asarray(block_segments([jnp.asarray(part, jnp.int32) for part in parts]))
    flat = np.concatenate([part.ravel() for part in parts])
    np.testing.assert_array_equal(found[0] > 0, flat > 0)
    assert found.min() == 0
    numbers, counts = np.unique(found[found > 0], return_counts=True)
    assert len(numbers) == 2 * sum(rows for rows, _ in shapes) - 1
    assert sorted(set(counts.tolist())) == sorted({length // 2 for _, length in shapes})


def test_more_tokens_than_can_be_numbered_are_refused() -> None:
    part = jax.ShapeDtypeStruct((2**20, 1024), jnp.int32)
    jax.eval_shape(lambda a: block_segments([a]), part)
    with pytest.raises(ValueError, match="32 bits"):
        jax.eval_shape(lambda a, b: block_segments([a, b]), part, part)


def test_neighbours_of_one_shape_become_one_part_of_the_same_stream() -> None:
    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 1), jax.devices()[:2])):
        draw = np.random.default_rng(0)
        rows = [
            PackedText(
                *(jnp.asarray(draw.integers(0, 9, (count, length))) for _ in range(4)),
                jnp.asarray(draw.integers(0, 9, (count, visuals))),
            )
            for count, length, visuals in ((2, 8, 3), (4, 4, 1), (6, 4, 1), (2, 4, 2))
        ]
        merged = merge_alike(rows)
        assert [r.tokens.shape for r in merged] == [(2, 8), (10, 4), (2, 4)]
        for before, after in zip(zip(*rows, strict=True), zip(*merged, strict=True), strict=True):
            np.testing.assert_array_equal(join(before), join(after))
        texts = merge_alike([r._replace(visuals=None) for r in rows])
        assert [r.tokens.shape for r in texts] == [(2, 8), (12, 4)] and texts[1].visuals is None
