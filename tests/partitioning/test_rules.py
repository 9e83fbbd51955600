"""Tables against the real models' parameters, and golden specs of the paper's 80B model."""

import importlib
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from flamingo_jax.configuring import from_config
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment, MeshConfig
from flamingo_jax.partitioning import rules
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.partitioning.rules import Rule
from flamingo_jax.planning.counts import parameter_shapes
from flamingo_jax.tasks import stages


def load(name: str, arg: str = "") -> Experiment:
    return from_config(Experiment, importlib.import_module(f"configs.{name}").get_config(arg))


@pytest.fixture(scope="module")
def shapes_80b() -> dict[str, Any]:
    return parameter_shapes(load("flamingo_80b"))


def mesh(data: int, fsdp: int, model: int) -> Any:
    """A mesh of any size: rules only ask for its shape."""
    return jax.sharding.AbstractMesh(
        (data, fsdp, model), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3
    )


def specs(task: str, shapes: dict[str, Any], on: Mesh) -> dict[str, PartitionSpec]:
    return {name: sharding.spec for name, sharding in rules.shardings(task, shapes, on).items()}


def strip(spec: PartitionSpec) -> tuple:
    """A spec without the Nones at its end."""
    axes = list(spec)
    while axes and axes[-1] is None:
        axes.pop()
    return tuple(axes)


GOLDEN_MODEL = {
    "language_model/embedding": ("model",),
    "language_model/layers/attention/query": (None, None, "model"),
    "language_model/layers/attention/key": (None, None, "model"),
    "language_model/layers/attention/value": (None, None, "model"),
    "language_model/layers/attention/position": (None, None, "model"),
    "language_model/layers/attention/content_bias": (None, "model"),
    "language_model/layers/attention/position_bias": (None, "model"),
    "language_model/layers/attention/out": (None, "model"),
    "language_model/layers/feed_forward/up": (None, None, "model"),
    "language_model/layers/feed_forward/down": (None, "model"),
    "gated_xattn/layers/query": (None, None, "model"),
    "gated_xattn/layers/key": (None, None, "model"),
    "gated_xattn/layers/value": (None, None, "model"),
    "gated_xattn/layers/out": (None, "model"),
    "gated_xattn/layers/feed_forward/up": (None, None, "model"),
    "gated_xattn/layers/feed_forward/down": (None, "model"),
    "resampler/layers/query": (None, None, "model"),
    "resampler/layers/key": (None, None, "model"),
    "resampler/layers/value": (None, None, "model"),
    "resampler/layers/out": (None, "model"),
    "resampler/layers/feed_forward/up": (None, None, "model"),
    "resampler/layers/feed_forward/down": (None, "model"),
}


def test_the_80b_model_over_16_way_megatron(shapes_80b: dict[str, Any]) -> None:
    found = {
        name: strip(spec) for name, spec in specs("flamingo", shapes_80b, mesh(96, 1, 16)).items()
    }
    assert {name: spec for name, spec in found.items() if spec} == GOLDEN_MODEL


def test_fsdp_takes_another_axis_of_trained_matrices_alone(shapes_80b: dict[str, Any]) -> None:
    found = {
        name: strip(spec) for name, spec in specs("flamingo", shapes_80b, mesh(12, 8, 16)).items()
    }
    expected = {
        "gated_xattn/layers/query": (None, "fsdp", "model"),
        "gated_xattn/layers/out": (None, "model", None, "fsdp"),
        "gated_xattn/layers/feed_forward/up": (None, "fsdp", "model"),
        "gated_xattn/layers/feed_forward/down": (None, "model", "fsdp"),
        "resampler/input_projection": ("fsdp",),
        "resampler/latents": (None, "fsdp"),
        "resampler/layers/feed_forward/down": (None, "model", "fsdp"),
        "visual_projection": (None, "fsdp"),
        "extra_embedding": (None, "fsdp"),
        "gated_xattn/layers/attention_gate": (),
        "resampler/final_norm/scale": (),
    }
    assert {name: found[name] for name in expected} == expected
    frozen = {
        name: spec
        for name, spec in found.items()
        if name.startswith(("language_model", "vision_encoder"))
    }
    assert {name: spec for name, spec in frozen.items() if spec} == {
        k: v for k, v in GOLDEN_MODEL.items() if k.startswith("language_model")
    }


def test_moments_lie_over_data_besides_where_an_axis_divides(
    shapes_80b: dict[str, Any],
) -> None:
    trained = rules.trainable_names("flamingo", shapes_80b)
    places = rules.shardings("flamingo", shapes_80b, mesh(32, 2, 8))
    arrays = {
        name: jax.ShapeDtypeStruct(shapes_80b[name].shape, np.float32, sharding=places[name])
        for name in trained
    }
    found = {
        name: strip(sharding.spec) for name, sharding in rules.moment_shardings(arrays).items()
    }
    expected = {
        "gated_xattn/layers/query": (None, "fsdp", "model", "data"),
        "gated_xattn/layers/feed_forward/up": (None, "fsdp", "model"),
        "resampler/input_projection": ("fsdp", "data"),
        "gated_xattn/layers/attention_gate": (),
        "resampler/final_norm/scale": (),
    }
    assert {name: found[name] for name in expected} == expected
    alone = rules.moment_shardings(
        {name: laid_whole(a, mesh(64, 1, 1)) for name, a in arrays.items()}
    )
    assert strip(alone["gated_xattn/layers/feed_forward/up"].spec) == (None, None, "data")


def laid_whole(array: Any, on: Any) -> Any:
    return jax.ShapeDtypeStruct(
        array.shape, array.dtype, sharding=jax.sharding.NamedSharding(on, PartitionSpec())
    )


def test_what_trains(shapes_80b: dict[str, Any]) -> None:
    frozen = set(shapes_80b) - rules.trainable_names("flamingo", shapes_80b)
    assert {name.split("/")[0] for name in frozen} == {"vision_encoder", "language_model"}
    assert (
        not {name for name in shapes_80b if name.startswith(("vision_encoder", "language_model"))}
        - frozen
    )


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("contrastive_nfnet_f6", {}),
        ("lm_1b4", {}),
        ("lm_1b4", {"positions.kind": "rotary", "tied_embeddings": False}),
        ("flamingo_9b", {}),
    ],
)
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8), (1, 8, 1)])
def test_tables_cover_every_model_on_every_mesh(
    name: str, overrides: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    config = importlib.import_module(f"configs.{name}").get_config("tiny")
    for key, value in overrides.items():
        config.language_model.update_from_flattened_dict({key: value})
    experiment = from_config(Experiment, config)
    shapes = parameter_shapes(experiment)
    devices = make_mesh(MeshConfig(*shape))
    found = rules.shardings(experiment.task, shapes, devices)
    assert found.keys() == shapes.keys()
    for parameter, sharding in found.items():
        parts = sharding.shard_shape(shapes[parameter].shape)
        lead = rules.stack_axes(parameter)
        assert parts[:lead] == shapes[parameter].shape[:lead], "the layer axis is never sharded"
        assert all(
            whole % part == 0 for whole, part in zip(shapes[parameter].shape, parts, strict=True)
        )


@pytest.mark.parametrize("form", ["no_gating", "vanilla_xattn", "grafting", "mlp", "lm_scratch"])
def test_tables_cover_what_the_ablations_add(form: str) -> None:
    experiment = load("ablations", f"form={form},size=tiny")
    shapes, unfrozen = parameter_shapes(experiment), stages.unfrozen(experiment)
    found = rules.shardings("flamingo", shapes, mesh(1, 4, 2), unfrozen)
    trained = rules.trainable_names("flamingo", shapes, unfrozen)
    for name in shapes:
        spec = found[name].spec
        if name.endswith(("attention/query", "feed_forward/up", "gated_xattn/layers/query")):
            assert "model" in spec, name
            assert ("fsdp" in spec) == (name in trained), name
    assert all(name in trained for name in shapes if name.startswith("grafted/"))
    assert any(name.startswith("grafted/") for name in shapes) == (form == "grafting")


@pytest.mark.parametrize("name", ["lm_7b", "lm_70b", "contrastive_nfnet_f6"])
def test_full_sharding_shrinks_every_large_array_by_the_mesh(name: str) -> None:
    experiment = load(name)
    shapes = parameter_shapes(experiment)
    for parameter, sharding in rules.shardings(experiment.task, shapes, mesh(1, 16, 1)).items():
        size = np.prod(shapes[parameter].shape)
        if size > rules.LARGE:
            assert np.prod(sharding.shard_shape(shapes[parameter].shape)) * 16 == size, parameter


def test_first_match_wins_and_both_kinds_of_stale_table_are_named() -> None:
    table = (Rule("a/.*", 1), Rule("a/b|c", 2), Rule("head", 3, optional=True))
    assert rules.match(table, ["a/b", "c"]) == {"a/b": 1, "c": 2}
    with pytest.raises(ValueError, match="no rule matches the parameter 'd'"):
        rules.match(table, ["a/b", "c", "d"])
    with pytest.raises(ValueError, match="the rule 'a/b|c' decides about no parameter"):
        rules.match(table, ["a/b"])


def test_the_inputs_of_fewer_key_value_heads_than_devices_are_sharded() -> None:
    shapes = {
        f"layers/attention/{name}": jax.ShapeDtypeStruct((80, 8192, heads, 128), np.float32)
        for name, heads in (("query", 64), ("key", 8), ("value", 8))
    }
    rest = {
        name: s
        for name, s in parameter_shapes(load("lm_7b")).items()
        if name not in shapes and "attention/position" not in name
    }
    found = specs("language_modelling", shapes | rest, mesh(1, 2, 16))
    assert found["layers/attention/query"] == PartitionSpec(None, "fsdp", "model", None)
    # The largest axis that divides; `fsdp` takes what is left.
    for name in ("key", "value"):
        assert found[f"layers/attention/{name}"] == PartitionSpec(None, "model", None, "fsdp")


def test_a_large_array_that_an_axis_cannot_shard_is_named(shapes_80b: dict[str, Any]) -> None:
    with pytest.raises(
        UserError,
        match=(
            "'gated_xattn/layers/feed_forward/down' with shape .* cannot be sharded over model=7"
        ),
    ):
        rules.shardings("flamingo", shapes_80b, mesh(1, 1, 7))
