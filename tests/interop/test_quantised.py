"""int8 weights as they are read: the same integers in one read or many, on one device or eight,
and never more floats than a few layers at a time.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.checkpointing.export import export_model, open_export
from flamingo_jax.configuring import to_json
from flamingo_jax.experiment import MeshConfig, VisionConfig
from flamingo_jax.interop import quantised
from flamingo_jax.interop.load import load_language_model, load_vision_encoder
from flamingo_jax.interop.weight_sources import ExportedPart
from flamingo_jax.models import nfnet
from flamingo_jax.models.quantised import quantise_part
from flamingo_jax.models.vision import vision_encoder
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.pytrees import to_flat
from flamingo_jax.weight_parts import is_scale
from tests.interop import cases
from tests.models.filling import ONE_STAGE, filled


def arrays(model: nnx.Module) -> dict[str, jax.Array]:
    return to_flat(nnx.state(model))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    config, tensors = cases.fixture("llama")
    return cases.write_folder(
        tmp_path_factory.mktemp("llama"), config, tensors, files=2, dtype=np.float16
    )


def test_integers_are_those_of_the_model_in_floats(llama: pathlib.Path) -> None:
    floats = load_language_model(llama).model
    quantise_part(floats)
    expected = arrays(floats)
    found = arrays(load_language_model(llama, weights="int8").model)
    assert found.keys() == expected.keys() and any(a.dtype == jnp.int8 for a in found.values())
    for name, array in found.items():
        assert array.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_a_few_layers_at_a_time_give_the_same_in_eight_shards(
    llama: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = arrays(load_language_model(llama, weights="int8").model)
    monkeypatch.setattr(quantised, "AT_ONCE", 1)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    found = load_language_model(llama, weights="int8", mesh=mesh).model
    sharded = {
        name
        for name, array in arrays(found).items()
        if not array.sharding.is_fully_replicated and array.dtype == jnp.int8
    }
    assert {"layers/feed_forward/up/int8", "layers/attention/out/int8"} <= sharded
    for name, array in arrays(found).items():
        np.testing.assert_array_equal(array, alone[name], err_msg=name)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 100, (2, 8)), jnp.int32)
    places = jnp.tile(jnp.arange(8), (2, 1))
    run = jax.jit(lambda model: model(tokens, places, jnp.ones_like(tokens)))
    one = run(load_language_model(llama, weights="int8").model)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(run(found), one, rtol=1e-4, atol=1e-4)


def test_an_export_is_read_a_layer_at_a_time(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFNet's stacks lie below other names, and its filters are standardised as they are read."""
    shape = dataclasses.replace(ONE_STAGE, depths=(3,))
    monkeypatch.setitem(nfnet.VARIANTS, "one_stage", shape)
    config = VisionConfig(variant="one_stage", image_size=16)
    model = filled(lambda rngs: vision_encoder(config, rngs=rngs))
    export_model(
        tmp_path / "encoder",
        kind="vision_encoder",
        config=to_json(config),
        parameters={name: np.asarray(a) for name, a in arrays(model).items()},
    )
    read = []

    def watched(self: ExportedPart, targets, process_group=None, layers=None):  # type: ignore[no-untyped-def]
        read.append((sorted(targets), layers))
        return original(self, targets, process_group, layers)

    original = ExportedPart.read
    monkeypatch.setattr(ExportedPart, "read", watched)
    monkeypatch.setattr(quantised, "AT_ONCE", 1)
    found = arrays(load_vision_encoder(tmp_path / "encoder", weights="int8").model)
    floats, *weights = read
    shapes = open_export(tmp_path / "encoder").shapes
    assert all(
        name.rpartition("/")[2] in ("gain", "bias", "skip_gain", "down_bias", "up_bias")
        for name in floats[0]
    )
    assert all(len(names) == 1 for names, _ in weights)
    assert {name for names, _ in weights for name in names} | set(floats[0]) == set(shapes)
    quantise_part(model)
    for name, array in arrays(model).items():
        if is_scale(name):
            np.testing.assert_allclose(found[name], array, rtol=1e-6, err_msg=name)
        elif array.dtype == jnp.int8:
            # A sum in another order may move a value over a rounding's edge.
            difference = np.abs(np.asarray(found[name], int) - np.asarray(array, int))
            assert difference.max() <= 1 and difference.mean() < 1e-3, name
        else:
            np.testing.assert_array_equal(found[name], array, err_msg=name)
