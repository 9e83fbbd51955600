"""What a process reads is what its devices hold, however devices are dealt out."""

import numpy as np
import pytest

from flamingo_jax.experiment import MeshConfig
from flamingo_jax.partitioning.host_shard import WHOLE_BATCH, HostShard
from flamingo_jax.partitioning.mesh import batch_shardings, make_mesh
from tests.partitioning.processes import processes

ROWS, PLACES = 16, 3


def test_by_default_all_of_a_batch() -> None:
    assert WHOLE_BATCH.listed(4, 2) == 8
    np.testing.assert_array_equal(WHOLE_BATCH.rows(4), np.arange(4))
    np.testing.assert_array_equal(WHOLE_BATCH.visuals(4, 2), np.arange(8))
    np.testing.assert_array_equal(
        HostShard.of(make_mesh(MeshConfig(2, 2, 2))).rows(8), np.arange(8)
    )


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((4, 1, 2), [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]),
        ((1, 1, 8), [list(range(16))] * 2),
        ((1, 2, 4), [list(range(8)), list(range(8, 16))]),
    ],
)
def test_two_hosts_of_four_devices_that_follow_one_another(
    shape: tuple[int, int, int], rows: list[list[int]]
) -> None:
    shares = processes(shape, 2).shares
    assert [host_shard.rows(ROWS).tolist() for host_shard in shares] == rows
    visuals = [host_shard.visuals(ROWS, PLACES).tolist() for host_shard in shares]
    assert visuals == [list(range(24)), list(range(24, 48))], "no visual twice, though rows are"


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4), (1, 1, 8), (4, 2, 1)])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_every_device_finds_its_part_of_what_its_process_reads(
    count: int, shape: tuple[int, int, int], seed: int | None
) -> None:
    group = processes(shape, count, seed)
    batches = []
    for host_shard in group.shares:
        rows, listed = host_shard.rows(ROWS), host_shard.visuals(ROWS, PLACES)
        batches.append(
            {"tokens": rows[:, None] * 10, "visuals": rows[:, None], "images": listed[:, None]}
        )
        assert len(set(rows)) == len(rows) and (np.diff(rows) > 0).all()
        held = {
            host_shard.devices[place * len(host_shard.devices) // len(listed)][0]
            for place in range(len(listed))
        }
        assert held == {row * host_shard.row_shards // ROWS for row in rows}
    whole = group.assembled(batches)
    np.testing.assert_array_equal(whole["tokens"][:, 0], np.arange(ROWS) * 10)
    # Row after row, each row shard's filled up for its devices.
    each = ROWS * PLACES // group.shares[0].row_shards
    filled = np.pad(
        np.arange(ROWS * PLACES).reshape(-1, each),
        ((0, 0), (0, -each % shape[2])),
        constant_values=-1,
    )
    np.testing.assert_array_equal(whole["images"][:, 0], filled.reshape(-1))
    assert group.shares[0].listed(ROWS, PLACES) == filled.size
    decoded = np.concatenate([host_shard.visuals(ROWS, PLACES) for host_shard in group.shares])
    np.testing.assert_array_equal(
        np.sort(decoded[decoded >= 0]), np.arange(ROWS * PLACES), "each once"
    )


def test_a_part_that_is_not_held_is_no_part() -> None:
    first, _ = processes((2, 2, 2), 2).shares
    with pytest.raises(ValueError):
        first.by_row.cut(np.zeros((8, 2)), (slice(12, 16), slice(None)))
    with pytest.raises(ValueError, match="7 rows or visuals are no 2 equal parts"):
        first.by_row.shape(np.zeros((7, 2)))


def test_images_of_pairs_lie_with_their_rows() -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    listed, pairs = (
        batch_shardings(["images", "visuals", "tokens"], mesh),
        batch_shardings(["images", "tokens", "mask"], mesh),
    )
    assert listed["images"].shard_shape((16, 3)) == (2, 3) and listed["visuals"].shard_shape(
        (16, 3)
    ) == (4, 3)
    assert pairs["images"].shard_shape((16, 3)) == pairs["tokens"].shard_shape((16, 3)) == (4, 3)
    host_shard = processes((2, 2, 2), 2).shares[0]
    assert host_shard.parts({"images": 0, "mask": 0}) == {
        "images": host_shard.by_row,
        "mask": host_shard.by_row,
    }
