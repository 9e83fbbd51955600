"""Runs on questions: the encoder frozen or not, gone on from, with kept features, killed,
exported and evaluated.
"""

import dataclasses
import json
import os
import pathlib
import random
import signal

import jax
import numpy as np
import pytest

from flamingo_jax.checkpointing.export import Export
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment, MeshConfig, VisionConfig, ViTConfig
from flamingo_jax.models.vit import resize_positions
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.training.setup import initialise, make_setup
from tests.end_to_end import small, test_kills
from tests.end_to_end.test_frozen import run, train
from tests.end_to_end.test_kills import Start, finish, start  # noqa: F401 - a fixture
from tests.launch import commands

pytestmark = pytest.mark.usefixtures("one_device")

STEPS = 3
VIT = VisionConfig(
    image_size=32, vit=ViTConfig(patch_size=8, layers=1, width=16, heads=2, feed_forward=32)
)
"""Compiles in a fraction of an NFNet's time."""


def experiment_of(form: Experiment, **changes: object) -> Experiment:
    return dataclasses.replace(
        form,
        training=dataclasses.replace(
            form.training, **({"steps": STEPS, "save_every": 2} | changes)
        ),
    )  # type: ignore[arg-type]


def losses(folder: pathlib.Path) -> list[float]:
    return list(test_kills.losses(folder).values())


@pytest.fixture(scope="module")
def tuned(
    data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Experiment, Export]:
    """A Flamingo whose encoder was trained, and its export."""
    experiment = experiment_of(small.unfrozen(data))
    assert experiment.flamingo is not None
    experiment = dataclasses.replace(
        experiment, flamingo=dataclasses.replace(experiment.flamingo, vision=VIT)
    )
    return experiment, run(experiment, tmp_path_factory.mktemp("tuned"))


def test_an_unfrozen_encoder_moves_and_is_exported_and_the_language_model_stays(
    tuned: tuple[Experiment, Export],
) -> None:
    experiment, export = tuned
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        began = initialise(experiment, make_setup(experiment, mesh)).trainable
    assert {name.split("/")[0] for name in began} == {
        "vision_encoder",
        "resampler",
        "visual_projection",
        "gated_xattn",
        "extra_embedding",
    }
    found = export.read()
    assert all(found[name].dtype == np.float32 for name in began)
    assert [name for name in began if np.array_equal(found[name], began[name])] == []


def test_a_run_that_goes_on_has_the_unbroken_runs_losses(
    tuned: tuple[Experiment, Export], tmp_path: pathlib.Path
) -> None:
    experiment, export = tuned
    train(experiment_of(experiment, steps=2), tmp_path)
    train(experiment, tmp_path)
    assert losses(tmp_path) == losses(export.folder.parent) and len(losses(tmp_path)) == STEPS


def frozen_again(experiment: Experiment, export: Export) -> Experiment:
    """Fine-tuning of an export at another image size, with a rate that falls in steps."""
    assert experiment.flamingo is not None
    flamingo = dataclasses.replace(
        experiment.flamingo,
        vision=dataclasses.replace(experiment.flamingo.vision, image_size=48),
    )
    optimizer = dataclasses.replace(experiment.optimizer, schedule="stepwise", boundaries=(1,))
    origin = {
        "vision_encoder_from": "",
        "language_model_from": "",
        "flamingo_from": str(export.folder),
    }
    return experiment_of(
        dataclasses.replace(experiment, flamingo=flamingo, optimizer=optimizer, **origin),
        unfreeze_vision_encoder=False,
    )


def test_fine_tuning_goes_on_from_an_export(
    tuned: tuple[Experiment, Export], tmp_path: pathlib.Path
) -> None:
    experiment, export = tuned
    tuning, before = frozen_again(experiment, export), export.read()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        began = initialise(tuning, make_setup(tuning, mesh)).trainable
    assert "resampler/latents" in began and not any(
        name.startswith("vision_encoder/") for name in began
    )
    for name, value in began.items():
        np.testing.assert_array_equal(value, before[name])

    after = run(experiment_of(tuning, cache_features=True), tmp_path / "tuned").read(
        "vision_encoder/"
    )
    positions = after.pop("vision_encoder/position_embedding")
    assert after and all(np.array_equal(value, before[name]) for name, value in after.items())
    # A ViT's positions are those that it makes of its own for images of this size.
    np.testing.assert_allclose(
        positions,
        resize_positions(before["vision_encoder/position_embedding"], 6, 6),
        atol=1e-6,
    )


def test_what_does_not_belong_together_is_refused(
    tuned: tuple[Experiment, Export], tmp_path: pathlib.Path
) -> None:
    experiment, export = tuned
    tuning = frozen_again(experiment, export)
    assert tuning.flamingo is not None
    other = dataclasses.replace(
        tuning.flamingo, resampler=dataclasses.replace(tuning.flamingo.resampler, latents=3)
    )
    refused = {
        r"cache_features keeps what a frozen encoder makes, but training\.unfreeze_vision_encoder trains it": experiment_of(  # noqa: E501
            experiment, cache_features=True
        ),
        "flamingo_from brings the encoder and the language model along": dataclasses.replace(
            tuning, vision_encoder_from="random"
        ),
        "was trained with resampler.latents = 2, but this config": dataclasses.replace(
            tuning, flamingo=other
        ),
        "flamingo_from is 'nowhere', which is no folder": dataclasses.replace(
            tuning, flamingo_from="nowhere"
        ),
    }
    for sentence, wrong in refused.items():
        with pytest.raises(UserError, match=sentence):
            train(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.scale
def test_with_kept_features_the_losses_are_those_of_the_images(
    tuned: tuple[Experiment, Export], tmp_path: pathlib.Path
) -> None:
    tuning = experiment_of(frozen_again(*tuned), steps=30)
    for name, kept in (("images", False), ("kept", True)):
        train(experiment_of(tuning, cache_features=kept, steps=30), tmp_path / name)
    assert len(losses(tmp_path / "kept")) == 30
    np.testing.assert_allclose(losses(tmp_path / "kept"), losses(tmp_path / "images"), rtol=1e-5)


def test_evaluation_asks_as_training_did(
    tuned: tuple[Experiment, Export],
    data: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
) -> None:
    _, export = tuned
    evaluate = commands.load("evaluate")
    values = {
        "MODEL": str(export.folder),
        "OUTPUT": str(tmp_path),
        "BENCHMARK": [f"vqa:shapes={data}/vqa:unseen,support={data}/vqa:test"],
        "SHOTS": None,
        "BASELINE": "",
        "SUITE": [],
        "LAYOUT": False,
        "SEEDS": None,
        "WORDNET": "",
        "CONTROL": True,
        "PERMUTATIONS": 1,
        "TEXT_EXAMPLES": None,
        "QUESTION_PROMPT": None,
        "SELECTION": "random",
        "SEED": 0,
        "MAX_TOKENS": 2,
        "BEAM": 1,
        "SECONDS": "",
        "CURVES": [],
        "LIMIT": 8,
        "BATCH_SIZE": 8,
        "EVALUATOR": [],
        "CAPTION_PROMPT": "Output:",
        "SUPPORT_LIMIT": 2048,
        "CLASSES": "",
        "FRAMES": None,
        "FPS": None,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(evaluate, name, commands.flag(value))
        assert evaluate.main() == 0
    report = json.loads((tmp_path / "report.json").read_text())
    metrics = report["benchmarks"]["shapes"]["0"]
    assert {"accuracy", "majority answer"} <= set(metrics)
    (result,) = (tmp_path / "results").glob("*.json")
    protocol = json.loads(result.read_text())["protocol"]
    assert protocol["text_examples"] == 0 and protocol["scorer_options"]["majority_answer"]
    assert "shapes" in capsys.readouterr().out


@pytest.mark.scale
@pytest.mark.parametrize("stage", ["questions", "unfrozen"])
def test_killed_runs_on_questions_have_the_unbroken_runs_losses(
    stage: str,
    start: Start,
    tmp_path: pathlib.Path,  # noqa: F811
) -> None:  # noqa: F811
    finish(start(tmp_path / "unbroken", stage=stage))
    chance = random.Random(0)
    for _ in range(3):
        process = start(tmp_path / "killed", stage=stage)
        test_kills.wait_for(
            test_kills.last_step(tmp_path / "killed") + chance.randint(3, 6),
            tmp_path / "killed",
            process,
        )
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        finish(process, -signal.SIGKILL)
    finish(start(tmp_path / "killed", stage=stage))
    found = test_kills.losses(tmp_path / "killed")
    assert found == test_kills.losses(tmp_path / "unbroken") and len(found) == small.TRAINING.steps
