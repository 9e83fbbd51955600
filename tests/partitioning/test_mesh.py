"""Mesh shapes that fit eight devices, those that do not, and batches that divide."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import DatasetConfig, Experiment, MeshConfig
from flamingo_jax.partitioning.mesh import batch_shardings, check_batches, make_mesh


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(model=2), (4, 1, 2)),
        (MeshConfig(2, -1, 2), (2, 2, 2)),
        (MeshConfig(1, 1, 8), (1, 1, 8)),
        (MeshConfig(1, 8, -1), (1, 8, 1)),
    ],
)
def test_meshes_of_all_devices_with_auto_axes(config: MeshConfig, shape: tuple[int, ...]) -> None:
    mesh = make_mesh(config)
    assert tuple(mesh.shape.values()) == shape and mesh.axis_names == ("data", "fsdp", "model")
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_a_mesh_of_some_devices() -> None:
    assert make_mesh(MeshConfig(), jax.devices()[:4]).size == 4


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (MeshConfig(3, 1, 1), "does not fit 8 devices: choose sizes that multiply to 8"),
        (MeshConfig(2, 1, 1), "does not fit 8 devices"),
        (MeshConfig(-1, 3, 1), "make the product of the other sizes a divisor of 8"),
        (MeshConfig(-1, -1, 1), "one of them may be -1"),
        (MeshConfig(0, 1, 8), "sizes must be 1 or more"),
    ],
)
def test_meshes_that_do_not_fit(config: MeshConfig, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make_mesh(config)


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as laying out a mesh asks for: chips in a line, one core each."""

    id: int
    platform: str
    process_index: int = 0
    device_kind: str = "stand-in"
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        return self.id % 4, 0, 0


@dataclasses.dataclass(frozen=True)
class SlicedDevice(Device):
    slice_index: int = 0


def sliced(platform: str) -> list[Any]:
    """Eight devices of two hosts, which XLA numbers as two slices."""
    return [SlicedDevice(place, platform, place // 4, slice_index=place // 4) for place in range(8)]


def test_data_joins_tpu_slices_and_the_other_axes_stay_within() -> None:
    mesh = make_mesh(MeshConfig(4, 1, 2), sliced("tpu"))
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    np.testing.assert_array_equal(
        slices, np.broadcast_to(np.array([0, 0, 1, 1])[:, None, None], (4, 1, 2))
    )
    with pytest.raises(UserError, match="config.mesh.data is 1, but the 8 devices are 2 slices"):
        make_mesh(MeshConfig(1, 4, 2), sliced("tpu"))


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2), (1, 1, 8), (2, 2, 2)])
def test_axes_cross_the_hosts_of_a_gpu_cluster(platform: str, shape: tuple[int, int, int]) -> None:
    """The inner axes have neighbours: those of one host before those of the next."""
    mesh = make_mesh(MeshConfig(*shape), sliced(platform))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    np.testing.assert_array_equal(ids, np.arange(8).reshape(shape))


def test_slices_that_cannot_be_told_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[Any] = [Device(place, "tpu") for place in range(4)]
    assert make_mesh(MeshConfig(1, 4, 1), devices).size == 4
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    with pytest.raises(UserError, match="tells of 2 slices"):
        make_mesh(MeshConfig(1, 4, 1), devices)


def test_rows_lie_over_data_and_fsdp() -> None:
    sharding = batch_shardings(["tokens"], make_mesh(MeshConfig(2, 2, 2)))["tokens"]
    places = sharding.devices_indices_map((8, 3))
    assert {(index[0].start, index[0].stop) for index in places.values()} == {
        (0, 2),
        (2, 4),
        (4, 6),
        (6, 8),
    }
    assert len(places) == 8


def experiment(place: str = "data", task: str = "flamingo", **options: int) -> Experiment:
    dataset = dataclasses.replace(DatasetConfig(batch_size=8), **options)  # type: ignore[arg-type]
    return Experiment(task=task, **{place: {"m3w": dataset}})  # type: ignore[arg-type]


def test_batches_that_divide_pass() -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    for task in ("contrastive", "flamingo"):
        check_batches(experiment(task=task, batch_size=8, microbatches=2), mesh)
    check_batches(experiment("held_out", batch_size=8, microbatches=2), mesh)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            experiment(batch_size=6),
            (
                "config.data.m3w.batch_size is 6, but 2 (data) x 2 (fsdp) devices share it:"
                " make it a multiple of 4, such as 8"
            ),
        ),
        (
            experiment(batch_size=4, microbatches=2),
            (
                "2 (data) x 2 (fsdp) devices x 2 microbatches share it: make it a multiple of"
                " 8, such as 8"
            ),
        ),
        (experiment("held_out", batch_size=2), "config.held_out.m3w.batch_size is 2"),
        (
            experiment("held_out", batch_size=4, microbatches=4),
            "4 microbatches share it: make it a multiple of 16, such as 16",
        ),
        (experiment(batch_size=0), "make it a multiple of 4, such as 4"),
        (experiment(microbatches=0), "config.data.m3w.microbatches is 0"),
        (
            experiment(task="contrastive", microbatches=3),
            (
                "2 (data) x 2 (fsdp) devices x 3 microbatches share it: make it a multiple of"
                " 12, such as 12"
            ),
        ),
    ],
)
def test_batches_that_do_not_divide_are_refused_with_the_mend(
    given: Experiment, sentence: str
) -> None:
    with pytest.raises(UserError) as error:
        check_batches(given, make_mesh(MeshConfig(2, 2, 2)))
    assert sentence in str(error.value)
