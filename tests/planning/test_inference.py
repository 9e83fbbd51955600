"""The plan of inference: bytes against those of a real model and its cache, FLOPs against the
traced step, bounds against sums by hand.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from flamingo_jax.configuring import to_config
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import (
    AttentionConfig,
    ConditioningConfig,
    Experiment,
    FeedForwardConfig,
    FlamingoConfig,
    LanguageModelConfig,
    PositionsConfig,
    ResamplerConfig,
    VisionConfig,
    ViTConfig,
)
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.planning.inference import InferenceLoad, plan_inference
from flamingo_jax.planning.topology import find_machine, open_topology
from tests.launch.commands import run

FLAMINGO = FlamingoConfig(
    vision=VisionConfig(
        image_size=32, vit=ViTConfig(patch_size=8, layers=2, width=32, heads=4, feed_forward=64)
    ),
    language_model=LanguageModelConfig(
        vocab_size=512,
        layers=5,
        width=64,
        attention=AttentionConfig(heads=8, head_width=16),
        feed_forward=FeedForwardConfig(width=256),
    ),
    resampler=ResamplerConfig(
        layers=2, width=64, heads=8, head_width=16, latents=4, feed_forward=128
    ),
    conditioning=ConditioningConfig(xattn_every=2, heads=8, head_width=8, feed_forward=128),
)
LOAD = InferenceLoad(batch=3, prompt_tokens=60, new_tokens=8, visuals=2)
ROTARY = PositionsConfig(kind="rotary")


def _with_text(**changes: object) -> FlamingoConfig:
    text = dataclasses.replace(FLAMINGO.language_model, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(FLAMINGO, language_model=text)


@pytest.mark.parametrize(
    "config",
    [
        FLAMINGO,
        _with_text(positions=ROTARY, tied_embeddings=False),
        _with_text(attention=AttentionConfig(heads=8, head_width=16, kv_heads=2)),
        dataclasses.replace(
            FLAMINGO,
            conditioning=dataclasses.replace(
                FLAMINGO.conditioning, attend_to_media="all_previous", text_window=4
            ),
        ),
        dataclasses.replace(
            FLAMINGO,
            conditioning=dataclasses.replace(
                FLAMINGO.conditioning, kind="grafting", grafted_layers=2
            ),
        ),
    ],
    ids=["transformer-xl", "rotary", "grouped", "window", "grafting"],
)
def test_bytes_and_flops_on_one_device_are_those_of_the_model(config: FlamingoConfig) -> None:
    plan = plan_inference(config, find_machine("h200_1"), LOAD)
    model = nnx.eval_shape(lambda: Flamingo(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    # Trained parameters are float32, frozen ones bfloat16.
    size = {"vision_encoder": 2, "language_model": 2}
    weights = sum(
        array.size * size.get(path[0], 4) for path, array in nnx.to_flat_state(nnx.state(model))
    )
    slots = 64 + 8  # The bucket of 60, and the new tokens.
    cache = jax.eval_shape(lambda: _cache(config, slots))
    held = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(cache))
    tokens = jax.ShapeDtypeStruct((6, 4, 64), jnp.bfloat16)
    media = jax.eval_shape(lambda x: _model(config).prepare_media(x).media, tokens)
    assert plan["bytes"]["weights"] == weights
    assert plan["bytes"]["cache"] == held
    assert plan["bytes"]["visual_keys_values"] == sum(a.size * 2 for a in jax.tree.leaves(media))
    assert plan["total_bytes"] == sum(plan["bytes"].values()) and plan["fits"]
    # Norms and gates, 1 or 2 % of so small a model, are parameters but no products.
    token = plan["flops_of_a_token"]
    assert 0.96 < token["jaxpr"] / (token["weights"] + token["attention"]) <= 1.0
    json.dumps(plan)


def _model(config: FlamingoConfig) -> Flamingo:
    return Flamingo(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)


def _cache(config: FlamingoConfig, slots: int) -> object:
    return _model(config).init_cache(LOAD.batch, slots)


def test_a_mesh_divides_the_bytes_and_sends_the_sums() -> None:
    one = plan_inference(FLAMINGO, find_machine("h200_1"), LOAD)
    eight = plan_inference(FLAMINGO, find_machine("h200_8"), LOAD)
    assert eight["mesh"] == {"data": 1, "fsdp": 1, "model": 8}
    assert eight["bytes"]["cache"] == one["bytes"]["cache"] / 8
    assert eight["bytes"]["visual_keys_values"] == one["bytes"]["visual_keys_values"] / 8
    assert eight["flops"]["token"] == pytest.approx(one["flops"]["token"])
    assert one["seconds"]["token"]["links"] == 0
    # Three sums a layer's two halves, three blocks' two and the embedding, by the ring, and the
    # logits of the vocabulary.
    sums, row = 5 * 2 + 3 * 2 + 1, 3 * 64 * 2
    sent = sums * 2 * 7 / 8 * row + 7 / 8 * 3 * 512 * 4
    assert eight["seconds"]["token"]["links"] == pytest.approx(sent / 450e9)


def test_weights_are_gathered_over_fsdp() -> None:
    """The trained matrices alone, each by the three other shards."""
    whole = plan_inference(FLAMINGO, find_machine("h200_4"), LOAD, mesh="data=4")
    shards = plan_inference(FLAMINGO, find_machine("h200_4"), LOAD, mesh="fsdp=4")
    assert shards["bytes"]["weights"] < whole["bytes"]["weights"]
    assert whole["seconds"]["token"]["links"] == 0 < shards["seconds"]["token"]["links"]
    assert shards["seconds"]["token"]["bytes"] == whole["seconds"]["token"]["bytes"]


def test_int8_halves_the_frozen_matrices_and_beams_share_the_prompt() -> None:
    machine = find_machine("v5e:1x1")
    plain, int8 = (
        plan_inference(FLAMINGO, machine, LOAD, frozen_dtype=dtype)
        for dtype in ("bfloat16", "int8")
    )
    frozen = nnx.state(_part_shapes())
    half = sum(array.size for array in jax.tree.leaves(frozen) if array.ndim > 1)
    saved = plain["bytes"]["weights"] - int8["bytes"]["weights"]
    # Vectors of a stack of layers have two axes and stay; scales come in addition.
    assert 0.85 * half < saved < half
    assert int8["flops"] == plain["flops"]
    beams = plan_inference(FLAMINGO, machine, dataclasses.replace(LOAD, beams=3))
    text = 5 * 2 * 8 * 16 * 2
    assert beams["bytes"]["cache"] - plain["bytes"]["cache"] == 2 * 3 * 8 * text
    assert beams["flops"]["token"] == 3 * plain["flops"]["token"]


def _part_shapes() -> object:
    model = nnx.eval_shape(lambda: _model(FLAMINGO))
    return nnx.Dict(text=model.language_model, vision=model.vision_encoder)


def test_what_bounds_a_step_is_the_longest_of_three() -> None:
    plan = plan_inference(FLAMINGO, find_machine("v4:2x2x1"), LOAD, mesh="model=4")
    for name, seconds in plan["seconds"].items():
        by = {key: seconds[key] for key in ("flops", "bytes", "links")}
        assert seconds["bound"] == max(by.values()) == by[seconds["by"]], name
    seconds = plan["seconds"]
    assert plan["tokens_per_second"] == 3 / seconds["token"]["bound"]
    assert plan["answer_seconds"] == pytest.approx(
        seconds["encode"]["bound"] + seconds["prefill"]["bound"] + 8 * seconds["token"]["bound"]
    )


def test_no_visuals_no_work_for_them() -> None:
    plan = plan_inference(FLAMINGO, find_machine("h200_1"), dataclasses.replace(LOAD, visuals=0))
    assert plan["flops"]["encode"] == 0 == plan["bytes"]["visual_keys_values"]


@pytest.mark.parametrize("name", ["h200", "h300_8", "h200_0", "v4:2x0x2", "v9:2x2"])
def test_an_unknown_machine_is_one_sentence(name: str) -> None:
    with pytest.raises(UserError, match="such as h200_8"):
        find_machine(name)


def test_gpus_have_no_compiler_here() -> None:
    assert find_machine("2*h200_8").chips == 16 and find_machine("2*v4:2x2x4").chips == 32
    with pytest.raises(UserError, match="--inference"):
        open_topology("h200_8")


def test_a_model_too_large_for_the_machine_is_one_sentence() -> None:
    wide = _with_text(vocab_size=2**30)
    with pytest.raises(UserError, match="weights take"):
        plan_inference(wide, find_machine("v5e:1x1"), LOAD)


def _run_plan(**values: object) -> int:
    config = to_config(dataclasses.replace(Experiment(name="small"), flamingo=FLAMINGO))
    return run("plan", **{"CONFIG": config, "INFERENCE": True, **values})


def test_the_command_prints_json_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"TOPOLOGY": "h200_4", "BATCH": 2, "VISUALS": 1}
    assert _run_plan(JSON=True, **flags) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["fits"] and made["load"]["batch"] == 2 and made["mesh"]["model"] == 4
    assert _run_plan(**flags) == 0
    shown = capsys.readouterr().out
    assert "a device's memory" in shown and "tokens a second" in shown


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({}, "nothing to plan"),
        ({"COUNTS": True}, "by a call of its own"),
        ({"TOPOLOGY": "h200_8", "MESH": "model=3"}, "does not fit 8 devices"),
        ({"TOPOLOGY": "h200_8", "COMPILE": True}, "node of GPUs"),
    ],
)
def test_wrong_flags_are_one_sentence(flags: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        _run_plan(**flags)
