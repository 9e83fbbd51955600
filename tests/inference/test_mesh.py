"""Every mesh of eight devices gives the texts, scores, features and logits of one device."""

import itertools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import flamingo_jax as fj
from flamingo_jax.inference.placement import Placement, bytes_per_device, parameter_shardings
from flamingo_jax.pytrees import from_flat, to_flat
from tests.inference.meshes import METHODS, exported, model_of_eight_heads, require_equal, results

SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(shape) == 8]


class OneDevice(dict[str, Any]):
    """The results of one device, each computed when it is first asked for."""

    def __init__(self, folder: pathlib.Path):
        super().__init__()
        self._model = fj.load(folder)

    def __missing__(self, method: str) -> Any:
        self[method] = METHODS[method](self._model)
        return self[method]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return exported(model_of_eight_heads(), tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two key-value heads, which do not divide over `model`, and rotary positions."""
    return exported(model_of_eight_heads(2, "rotary"), tmp_path_factory.mktemp("grouped"))


@pytest.fixture(scope="module")
def alone(folder: pathlib.Path) -> OneDevice:
    return OneDevice(folder)


@pytest.fixture(scope="module")
def grouped_alone(grouped: pathlib.Path) -> OneDevice:
    return OneDevice(grouped)


def mesh_of(shape: tuple[int, int, int]) -> Any:
    return fj.make_mesh("data={},fsdp={},model={}".format(*shape))


@pytest.mark.parametrize(
    ("shape", "methods"),
    [((2, 2, 2), ["beams", "sampled", "features"]), ((1, 1, 8), ["greedy", "candidates"])],
)
def test_a_mesh_gives_the_results_of_one_device(
    alone: OneDevice, folder: pathlib.Path, shape: tuple[int, int, int], methods: list[str]
) -> None:
    model = fj.load(folder, mesh=mesh_of(shape))
    require_equal(results(model, methods), alone)
    assert "sampled" not in alone or len(set(map(tuple, alone["sampled"]["tokens"]))) == 3


@pytest.mark.scale
@pytest.mark.parametrize("shape", SHAPES)
def test_every_mesh_gives_all_results_of_one_device(
    alone: OneDevice, folder: pathlib.Path, shape: tuple[int, int, int]
) -> None:
    require_equal(results(fj.load(folder, mesh=mesh_of(shape))), alone)


@pytest.mark.scale
@pytest.mark.parametrize("shape", [(1, 2, 4), (2, 1, 4), (1, 1, 8), (4, 1, 2)])
def test_key_value_heads_that_do_not_divide_are_whole_on_every_device(
    grouped_alone: OneDevice, grouped: pathlib.Path, shape: tuple[int, int, int]
) -> None:
    require_equal(results(fj.load(grouped, mesh=mesh_of(shape))), grouped_alone)


def test_parameters_are_read_into_their_shards(folder: pathlib.Path) -> None:
    flamingo = fj.load(folder, mesh=mesh_of((2, 2, 2))).flamingo
    whole = to_flat(nnx.split(fj.load(folder).flamingo)[1])
    for name, value in to_flat(nnx.split(flamingo)[1]).items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)
    # Megatron over `model`; `fsdp` shards what was trained, and frozen matrices are whole.
    query = flamingo.language_model.layers.attention.query[...]
    assert query.sharding.shard_shape(query.shape) == (2, 32, 4, 4)
    query = flamingo.gated_xattn.layers.query[...]
    assert query.sharding.shard_shape(query.shape) == (2, 16, 4, 4)


def test_frozen_weights_that_do_not_fit_are_gathered() -> None:
    shapes = to_flat(nnx.split(model_of_eight_heads().model)[1])
    mesh = mesh_of((1, 8, 1))
    roomy, whole = parameter_shardings(shapes, mesh), sum(a.nbytes for a in shapes.values())
    name = "language_model/layers/feed_forward/up"
    assert roomy[name].is_fully_replicated
    tight = parameter_shardings(shapes, mesh, memory=whole // 2)
    assert tight[name].shard_shape(shapes[name].shape) == (2, 4, 64)
    assert bytes_per_device(shapes, tight) < whole / 4
    with pytest.raises(fj.UserError, match="the weights take .* give model or fsdp more devices"):
        parameter_shardings(shapes, mesh, memory=whole // 10)


@pytest.mark.scale
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8)])
def test_int8_weights_on_a_mesh_give_those_of_one_device(
    folder: pathlib.Path, shape: tuple[int, int, int]
) -> None:
    methods = ["greedy", "candidates", "features"]
    wanted = results(fj.load(folder, frozen_dtype="int8"), methods)
    model = fj.load(folder, mesh=mesh_of(shape), frozen_dtype="int8")
    require_equal(results(model, methods), wanted)


@pytest.mark.scale
def test_gathered_weights_give_the_same_results(alone: OneDevice, folder: pathlib.Path) -> None:
    model = fj.load(folder, mesh=mesh_of((1, 4, 2)))
    graph, state = nnx.split(model.flamingo)
    parameters = to_flat(state)
    memory = sum(a.nbytes for a in parameters.values()) // 2
    mesh = mesh_of((1, 4, 2))
    shardings = parameter_shardings(parameters, mesh, memory=memory)
    name = "language_model/layers/feed_forward/up"
    assert parameters[name].sharding != shardings[name]
    moved = jax.device_put(parameters, shardings)
    state = nnx.State(from_flat(moved))
    require_equal(results(fj.Model(nnx.merge(graph, state), model.tokenizer)), alone)


def test_a_mesh_that_does_not_fit_gets_one_sentence(folder: pathlib.Path) -> None:
    cases = {
        "data=2,data=4": "must be AXIS=SIZE,... with each of data, fsdp, model at most once",
        "heads=2": "must be AXIS=SIZE",
        "model=3": "the mesh data=-1 x fsdp=1 x model=3 does not fit 8 devices",
        "data=2,model=2": "does not fit 8 devices: choose sizes that multiply to 8",
    }
    for text, sentence in cases.items():
        with pytest.raises(fj.UserError, match=sentence):
            fj.load(folder, mesh=fj.make_mesh(text))
    six = fj.make_mesh("model=6", jax.devices()[:6])
    with pytest.raises(fj.UserError, match="8 heads do not divide over it: choose model from 1, 2"):
        fj.load(folder, mesh=six)
    assert dict(fj.make_mesh("model=2").shape) == {"data": 4, "fsdp": 1, "model": 2}


def test_one_device_is_placed_as_ever() -> None:
    model = model_of_eight_heads().model
    placement = Placement.of(nnx.split(model)[1])
    assert placement.mesh is None and placement.row_shards == 1 and placement.devices == 1
