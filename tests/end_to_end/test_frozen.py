"""Three stages, each on the exports of those before: what is frozen stays as it was to the bit,
and an export is the model trained.
"""

import dataclasses
import json
import logging
import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipelines.iterators import make_iterators
from flamingo_jax import configuring
from flamingo_jax.checkpointing.checkpoints import Checkpoints
from flamingo_jax.checkpointing.export import Export, open_export
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.inference.loading import load_flamingo
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.training.exporting import export_run
from flamingo_jax.training.pretrained import load_frozen
from flamingo_jax.training.setup import initialise, make_setup
from flamingo_jax.training.state import merge_model
from tests.end_to_end import small
from tests.launch import commands

TRAINING = dataclasses.replace(small.TRAINING, steps=4)


def run(experiment: Experiment, folder: pathlib.Path) -> Export:
    """Trains and exports with the commands' own main functions; `folder/export` is the export."""
    train(experiment, folder)
    assert commands.run("export", WORKDIR=str(folder), OUTPUT=str(folder / "export")) == 0
    return open_export(folder / "export")


def train(experiment: Experiment, folder: pathlib.Path) -> None:
    """Trains with the command's own main function."""
    config = configuring.to_config(experiment)
    assert commands.run("train", CONFIG=config, PREPARE=False, WORKDIR=str(folder)) == 0


@pytest.fixture(scope="module")
def stages(
    data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Experiment, Export, Export, Export]:
    """The Flamingo's experiment, and the exports of the encoder, the language model and the
    Flamingo.
    """
    folder = tmp_path_factory.mktemp("stages")
    contrastive = run(small.contrastive(data, training=TRAINING), folder / "contrastive")
    language_model = run(small.language_model(data, training=TRAINING), folder / "language_model")
    experiment = small.flamingo(
        data,
        training=TRAINING,
        vision_encoder_from=str(contrastive.folder),
        language_model_from=str(language_model.folder),
    )
    # One dataset compiles in a quarter of the time of four.
    experiment = dataclasses.replace(experiment, data={"m3w": experiment.data["m3w"]})
    return experiment, contrastive, language_model, run(experiment, folder / "flamingo")


def test_frozen_parts_are_their_exports_to_the_bit(
    stages: tuple[Experiment, Export, Export, Export],
) -> None:
    _, contrastive, language_model, flamingo = stages
    for base, source, part in (
        (contrastive, "vision/", "vision_encoder/"),
        (language_model, "", "language_model/"),
    ):
        expected = {
            part + name.removeprefix(source): value for name, value in base.read(source).items()
        }
        found = flamingo.read(part)
        assert found and sorted(found) == sorted(expected)
        for name, value in found.items():
            assert (
                value.dtype == expected[name].dtype and value.tobytes() == expected[name].tobytes()
            ), name


def test_every_trained_parameter_has_moved(
    stages: tuple[Experiment, Export, Export, Export],
) -> None:
    experiment, _, _, flamingo = stages
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        start = initialise(experiment, make_setup(experiment, mesh)).trainable
    found = flamingo.read()
    assert {name.split("/")[0] for name in start} == {
        "resampler",
        "visual_projection",
        "gated_xattn",
        "extra_embedding",
    }
    still = [
        name for name, value in start.items() if np.array_equal(found[name], np.asarray(value))
    ]
    assert not still


def test_an_export_gives_the_logits_of_the_model_trained(
    stages: tuple[Experiment, Export, Export, Export],
) -> None:
    experiment, *_, flamingo = stages
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        setup = make_setup(experiment, mesh)
        checkpoints = Checkpoints(flamingo.folder.parent / "checkpoints", keep_last=2)
        state = checkpoints.restore(TRAINING.steps, setup.state)
        checkpoints.close()
        frozen, _ = load_frozen(experiment, setup.frozen)
    parameters = jax.device_get(state.trainable | frozen)
    iterator = make_iterators(experiment, Tokenizer.load(experiment.tokenizer))["m3w"]
    batch = {name: jnp.asarray(value) for name, value in next(iterator).items()}
    iterator.close()

    @nnx.jit
    def logits(model: Flamingo) -> jax.Array:
        visuals = model.encode_visuals(batch["images"], batch["frame_mask"])
        return model(
            batch["tokens"],
            batch["positions"],
            batch["segments"],
            batch["media_index"],
            visuals,
            batch["visuals"],
        )

    loaded = load_flamingo(flamingo.folder)
    assert loaded.config == experiment.flamingo
    trained = merge_model(
        setup.graph, {name: jnp.asarray(value) for name, value in parameters.items()}
    )
    np.testing.assert_array_equal(logits(loaded.model), logits(trained))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda step: (step / "contents.json").write_text("{}"), "it is damaged"),
        (lambda step: (step / "manifest.json").unlink(), "its save was not finished"),
    ],
)
def test_an_export_says_which_step_it_takes_and_changes_nothing_in_the_workdir(
    harm: Callable[[pathlib.Path], object],
    told: str,
    stages: tuple[Experiment, Export, Export, Export],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, _, language_model, _ = stages
    workdir = tmp_path / "run"
    ignore = shutil.ignore_patterns("export", "compiled")
    shutil.copytree(language_model.folder.parent, workdir, ignore=ignore)
    harm(workdir / "checkpoints" / "4")
    before = {path.relative_to(workdir) for path in workdir.rglob("*")}
    export = commands.load("export")
    monkeypatch.setattr(export, "WORKDIR", commands.flag(str(workdir)))
    monkeypatch.setattr(export, "OUTPUT", commands.flag(str(tmp_path / "export")))
    with caplog.at_level(logging.INFO):
        assert export.main() == 0
    assert f"taking step 3 of 4; not step 4: {told}" in caplog.text
    assert {path.relative_to(workdir) for path in workdir.rglob("*")} == before
    shutil.rmtree(workdir / "checkpoints" / "3")
    shutil.rmtree(tmp_path / "export")
    with pytest.raises(UserError, match=f"has no whole checkpoint; not step 4: {told}"):
        export.main()


def test_an_export_reads_no_moments_and_has_a_card(
    stages: tuple[Experiment, Export, Export, Export], tmp_path: pathlib.Path
) -> None:
    _, contrastive, _, flamingo = stages
    workdir = tmp_path / "run"
    ignore = shutil.ignore_patterns("export", "compiled")
    shutil.copytree(flamingo.folder.parent, workdir, ignore=ignore)
    state = workdir / "checkpoints" / "4" / "state"
    moments = [file for file in (state / "other").rglob("d/*") if file.is_file()]
    for file in moments:
        file.write_bytes(bytes(file.stat().st_size))
    export_run(workdir, tmp_path / "export")
    found, expected = open_export(tmp_path / "export").read(), flamingo.read()
    assert moments and list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    # A damaged parameter is another matter: the step before is taken.
    for file in (state / "trainable").rglob("d/*"):
        file.write_bytes(bytes(file.stat().st_size))
    export_run(workdir, tmp_path / "before")
    card = (tmp_path / "before" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name:") and "| exported step | 3 of 4 |" in card
    for said in (str(contrastive.folder), contrastive.digest, "| m3w | pages |", "fj.load"):
        assert said in card
    count = sum(value.size for value in expected.values())
    assert f"| total | {count:,} |" in card


def test_with_kept_features_the_losses_are_those_of_the_images(
    stages: tuple[Experiment, Export, Export, Export], tmp_path: pathlib.Path
) -> None:
    experiment, *_, flamingo = stages
    cached = dataclasses.replace(
        experiment, training=dataclasses.replace(experiment.training, cache_features=True)
    )
    run(cached, tmp_path)

    def losses(folder: pathlib.Path) -> list[float]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    expected = losses(flamingo.folder.parent)
    assert len(expected) == TRAINING.steps
    np.testing.assert_allclose(losses(tmp_path), expected, rtol=1e-5)
