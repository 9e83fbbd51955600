"""The devices of --mesh, and what is said of a mesh that they do not make."""

import pytest

from flamingo_jax.errors import UserError
from launch.devices import is_first_process, open_mesh


def test_one_device_without_a_mesh() -> None:
    assert open_mesh("") is None
    assert is_first_process()


def test_the_axes_that_are_named_and_data_for_the_rest() -> None:
    for text, shape in {
        "data=2,model=4": (2, 1, 4),
        "model=2": (4, 1, 2),
        "fsdp=-1, model=2": (1, 4, 2),
        "fsdp=8": (1, 8, 1),
    }.items():
        mesh = open_mesh(text)
        assert mesh is not None and tuple(mesh.shape.values()) == shape, text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("2x4", "the mesh '2x4' must be AXIS=SIZE,... .* such as data=2,model=4"),
        ("model=2,model=4", "at most once"),
        ("model=99999999", "must be AXIS=SIZE"),
        ("model=3", "the mesh data=-1 x fsdp=1 x model=3 does not fit 8 devices: make"),
        ("data=0", "the mesh is data=0 x fsdp=1 x model=1: sizes must be 1 or more"),
    ],
)
def test_other_meshes_get_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        open_mesh(text)
