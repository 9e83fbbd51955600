"""A run on int8 frozen parts: what is planned is what is held, it trains and resumes, and its
export has the floats of the parts' folders.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flamingo_jax as fj
from flamingo_jax.checkpointing.export import Export, export_model, open_export
from flamingo_jax.configuring import to_json
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import (
    Experiment,
    LoRAConfig,
    TrainingConfig,
    VisionConfig,
    ViTConfig,
)
from flamingo_jax.interop.load import load_vision_encoder
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.models.vision import vision_encoder
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.planning.counts import checkpoint_bytes, count_parameters
from flamingo_jax.processing.normalise import normalise
from flamingo_jax.pytrees import to_flat
from flamingo_jax.tasks import stages
from flamingo_jax.tasks.flops import step_cost
from flamingo_jax.training import overview
from flamingo_jax.training.frozen_encoder import load_frozen_encoder
from flamingo_jax.training.pretrained import load_frozen
from flamingo_jax.training.setup import make_setup
from flamingo_jax.training.trained_run import load_trained_run
from flamingo_jax.weight_parts import is_multiplied
from tests.end_to_end import small
from tests.end_to_end.test_frozen import run, train
from tests.models.filling import filled

pytestmark = pytest.mark.usefixtures("one_device")
STEPS = 2
TRAINING = dataclasses.replace(small.TRAINING, steps=STEPS, frozen_dtype="int8")
FLOATS = dataclasses.replace(TRAINING, frozen_dtype="compute_dtype")
LORA = LoRAConfig(rank=2, alpha=4.0, targets=("attention/(query|out)", "feed_forward/down"))


VISION = VisionConfig(
    image_size=32, vit=ViTConfig(patch_size=16, layers=1, width=16, heads=2, feed_forward=32)
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders of a language model and an encoder, in two dtypes."""
    folder = tmp_path_factory.mktemp("parts")
    models = {
        "vision_encoder": (VISION, filled(lambda rngs: vision_encoder(VISION, rngs=rngs))),
        "language_model": (
            small.LANGUAGE_MODEL,
            filled(lambda rngs: LanguageModel(small.LANGUAGE_MODEL, rngs=rngs)),
        ),
    }
    for part, (config, model) in models.items():
        dtype = np.float16 if part == "vision_encoder" else np.float32
        export_model(
            folder / part,
            kind=part,
            config=to_json(config),
            parameters={n: np.asarray(a, dtype) for n, a in to_flat(nnx.state(model)).items()},
        )
    return {f"{part}_from": str(folder / part) for part in models}


def experiment_of(
    data: pathlib.Path, parts: dict[str, str], training: TrainingConfig = TRAINING
) -> Experiment:
    experiment = small.pages(data, training=training, **parts)
    assert experiment.flamingo is not None
    flamingo = dataclasses.replace(experiment.flamingo, vision=VISION)
    return dataclasses.replace(experiment, flamingo=flamingo)


@pytest.fixture(scope="module")
def flamingo(
    data: pathlib.Path,
    parts: dict[str, str],
    one_device: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Export:
    return run(experiment_of(data, parts), tmp_path_factory.mktemp("flamingo"))


def losses(folder: pathlib.Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.scale
def test_it_trains_nearly_as_on_floats(
    data: pathlib.Path, parts: dict[str, str], tmp_path: pathlib.Path
) -> None:
    found = {}
    for name, training in {"int8": TRAINING, "floats": FLOATS}.items():
        training = dataclasses.replace(training, steps=200, save_every=1000)
        train(experiment_of(data, parts, training), tmp_path / name)
        found[name] = losses(tmp_path / name)
    assert len(found["int8"]) == 200 and found["int8"] != found["floats"]
    means = {name: np.reshape(values, (10, 20)).mean(1) for name, values in found.items()}
    print(means)
    np.testing.assert_allclose(means["int8"], means["floats"], rtol=0.02)
    assert means["int8"][-1] < 0.9 * means["int8"][0], "nothing was learned"


def test_an_export_has_the_floats_of_the_folders_and_loads_as_the_integers_trained_on(
    data: pathlib.Path, parts: dict[str, str], flamingo: Export, tmp_path: pathlib.Path
) -> None:
    for part in ("language_model", "vision_encoder"):
        source = open_export(parts[f"{part}_from"]).read()
        exported = flamingo.read(f"{part}/")
        assert len(source) == len(exported)
        for name, value in source.items():
            found = exported[f"{part}/{name}"]
            assert found.dtype == value.dtype
            np.testing.assert_array_equal(found, value, err_msg=name)
    trained = load_trained_run(flamingo.folder.parent).frozen
    loaded = fj.load(flamingo.folder, frozen_dtype="int8")
    arrays = to_flat(nnx.state(loaded.flamingo))
    integers = [name for name, value in trained.items() if value.dtype == jnp.int8]
    assert len(integers) == 15
    for name, value in trained.items():
        np.testing.assert_array_equal(arrays[name], value, err_msg=name)
    # Saved as the floats that they stand for, they are the same integers again.
    loaded.save(tmp_path / "saved")
    again = to_flat(nnx.state(fj.load(tmp_path / "saved", frozen_dtype="int8").flamingo))
    for name, value in arrays.items():
        np.testing.assert_allclose(again[name], value, rtol=3e-7, err_msg=name)
    with pytest.raises(UserError, match="frozen_dtype is 'int4', but must be float32"):
        fj.load(flamingo.folder, frozen_dtype="int4")


def test_bytes_parameters_and_flops_are_asked_of_the_weights(
    data: pathlib.Path, parts: dict[str, str]
) -> None:
    experiment, floats = experiment_of(data, parts), experiment_of(data, parts, FLOATS)
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        setup = make_setup(experiment, mesh)
        frozen, _ = load_frozen(experiment, setup.frozen)
    assert {n: (a.shape, a.dtype) for n, a in frozen.items()} == {
        n: (s.shape, s.dtype) for n, s in setup.frozen.items()
    }
    held = sum(array.nbytes for array in frozen.values())
    planned, before = checkpoint_bytes(experiment), checkpoint_bytes(floats)
    assert planned["frozen"] == held < 0.4 * before["frozen"]
    assert {k: v for k, v in planned.items() if k != "frozen"} == {
        k: v for k, v in before.items() if k != "frozen"
    }
    assert count_parameters(experiment) == count_parameters(floats)
    assert step_cost(experiment) == step_cost(floats)
    shown = [s for s in overview.summarise(setup) if not s.trained]
    assert sum(s.bytes_per_device for s in shown) == held
    assert sum(s.parameters for s in shown) == sum(
        a.size for name, a in frozen.items() if is_multiplied(name)
    )


def test_features_are_kept_of_the_encoder_in_integers(
    data: pathlib.Path, parts: dict[str, str]
) -> None:
    kept, floats = (
        load_frozen_encoder(experiment_of(data, parts, training)) for training in (TRAINING, FLOATS)
    )
    assert kept.digest == f"{floats.digest}_int8"
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    encoder = load_vision_encoder(parts["vision_encoder_from"], weights="int8").model
    pixels = normalise(jnp.asarray(images), VISION.mean, VISION.std, jnp.float32)
    expected = jax.jit(lambda model: model(pixels))(encoder)
    np.testing.assert_allclose(
        kept.encode(images), expected.reshape(2, -1, 16), rtol=1e-4, atol=1e-4
    )


def test_a_run_goes_on_in_the_dtype_it_began_with(
    data: pathlib.Path, parts: dict[str, str], flamingo: Export
) -> None:
    longer = dataclasses.replace(FLOATS, steps=STEPS + 1)
    with pytest.raises(
        UserError,
        match="has config.training.frozen_dtype = 'int8', but it is 'compute_dtype' here: set it",
    ):
        train(experiment_of(data, parts, longer), flamingo.folder.parent)


def test_low_rank_updates_train_over_integers(
    data: pathlib.Path, parts: dict[str, str], tmp_path: pathlib.Path
) -> None:
    training = dataclasses.replace(TRAINING, steps=2, lora=LORA)
    folder = parts["language_model_from"]
    experiment = small.language_model(data, training=training, language_model_from=folder)
    tuned = run(experiment, tmp_path)
    found = load_trained_run(tmp_path)
    assert "layers/attention/query/base/int8" in found.frozen
    assert {name.rpartition("/")[2] for name in found.trainable} == {"lora_down", "lora_up"}
    before, after = open_export(folder).read(), tuned.read()
    assert before.keys() == after.keys()
    for name, value in after.items():
        if f"{name}/lora_up" not in found.trainable:
            np.testing.assert_array_equal(value, before[name], err_msg=name)
            continue
        down, up = (
            np.asarray(found.trainable[f"{name}/{part}"], np.float64)
            for part in ("lora_down", "lora_up")
        )
        assert np.abs(up).max() > 0
        updates = np.stack([np.tensordot(d, u, 1) for d, u in zip(down, up, strict=True)])
        np.testing.assert_allclose(
            value, before[name] + 4.0 / 2 * updates, rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_where_nothing_is_frozen_it_is_told(data: pathlib.Path) -> None:
    for stage in (small.contrastive, small.language_model):
        with pytest.raises(UserError, match="'int8', but nothing of this run's model is frozen"):
            make_setup(stage(data, training=TRAINING), make_mesh(small.flamingo(data).mesh))
    trained = dataclasses.replace(TRAINING, unfreeze_language_model=True)
    assert stages.quantised_parts(small.flamingo(data, training=trained)) == ("vision_encoder",)
