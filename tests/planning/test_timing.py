"""The benchmark's model and batches, and a run of it."""

import numpy as np
import pytest

from configs.benchmark import experiment_of
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import MeshConfig
from flamingo_jax.partitioning.host_shard import HostShard
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.planning.counts import count_parameters
from flamingo_jax.planning.program import batch_shapes, full_work
from flamingo_jax.planning.synthetic import full_batches
from flamingo_jax.planning.timing import time_step
from flamingo_jax.tasks.flops import work_in

SIZES = "layers=2,width=16,heads=2,vocab=32,xattn_every=1,vit_layers=1,vit_width=16,vit_heads=2,image=16,patch=8,interleaved=8x3x12,pairs=16x1x8"  # noqa: E501


def test_sizes_make_the_model_they_name() -> None:
    experiment = experiment_of(SIZES)
    counts = count_parameters(experiment)
    # 4 D^2 + 8 D^2 and biases of queries, keys and values a layer; two norms each and one at
    # the end; embedding and head.
    assert counts["language_model"] == 2 * (12 * 16**2 + 3 * 16 + 2 * 16) + 16 + 2 * 32 * 16
    assert [(d.batch_size, d.visuals, d.max_length) for d in experiment.data.values()] == [
        (8, 3, 12),
        (16, 1, 8),
    ]


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (SIZES.replace("heads=2,vocab", "haeds=2,vocab"), "but no 'haeds', did you mean heads"),
        (SIZES.replace("layers=2,", ""), "'layers' is missing"),
        (SIZES.replace("8x3x12", "8x3"), "interleaved is '8x3', but must look like 8x3x128"),
        (SIZES.replace("vocab=32", "vocab=many"), "vocab is 'many', but must look like 4"),
        (SIZES.replace("heads=2,vocab", "heads=0,vocab"), "heads is '0', but must look like 4"),
        (
            SIZES.replace("8x3x12", "0x3x12"),
            "interleaved is '0x3x12', but must look like 8x3x128",
        ),
        (SIZES.replace("8x3x12", "8x3x1"), "sizes.data.m3w.max_length is 1, but must be 2 or more"),
    ],
)
def test_wrong_sizes_are_one_sentence(sizes: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        experiment_of(sizes)
    assert sentence in str(error.value)


@pytest.mark.parametrize("shape", [(8, 1, 1), (4, 1, 2)])
def test_batches_are_full_and_of_the_shapes_that_plans_compile(
    shape: tuple[int, int, int],
) -> None:
    """Also where three visuals of each row shard are filled up for two devices."""
    experiment, mesh = (
        experiment_of(SIZES if shape[2] == 1 else SIZES.replace("8x3x12", "4x3x12")),
        make_mesh(MeshConfig(*shape)),
    )
    batches = full_batches(experiment, HostShard.of(mesh))
    assert work_in(batches.values()) == full_work(experiment)
    assert batches["m3w"]["images"].shape[0] == (24 if shape[2] == 1 else 16)
    planned = batch_shapes(experiment, mesh)
    assert {n: {k: (a.shape, a.dtype) for k, a in b.items()} for n, b in batches.items()} == {
        n: {k: (s.shape, s.dtype) for k, s in b.items()} for n, b in planned.items()
    }
    assert (np.diff(batches["m3w"]["media_index"]) >= 0).all() and set(
        batches["m3w"]["media_index"][0]
    ) == {0, 1, 2}


def test_a_step_is_timed_part_by_part() -> None:
    timing = time_step(experiment_of(SIZES), steps=1)
    assert set(timing.parts) == {
        "vision encoder",
        "resampler",
        "language model",
        "optimizer",
        "gated blocks and the rest",
    }
    assert timing.tokens == 8 * 12 + 16 * 8 and timing.frames == 8 * 3 + 16
    assert timing.step > 0 and timing.mfu > 0 and timing.matrix_rate > 1e8
