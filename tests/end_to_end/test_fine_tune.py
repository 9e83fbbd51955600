"""launch.fine_tune on a tiny Flamingo: a grid of four cells, killed and gone on with, is the
unbroken one; the encoder moves in the cells that train it; another image size.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from flamingo_jax import configuring
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import DatasetConfig, Experiment, OptimizerConfig, TrainingConfig
from flamingo_jax.fine_tuning.config import FineTuningConfig
from flamingo_jax.inference.loading import load_flamingo
from flamingo_jax.models.vit import resize_positions
from flamingo_jax.pytrees import to_flat
from flamingo_jax.training.run import Run
from tests.inference.tiny_models import make_export
from tests.launch import commands

pytestmark = pytest.mark.usefixtures("one_device")

GRID = ["unfreeze_encoder=false,true", "steps=2,4"]


class KilledError(Exception):
    """Stands in for SIGKILL: nothing handles it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("model") / "export"
    make_export(folder)
    return folder


def experiment(data: pathlib.Path) -> Experiment:
    questions = DatasetConfig(
        "questions", str(data / "vqa"), split="test", batch_size=8, max_length=64, visuals=1
    )
    return Experiment(
        task="flamingo",
        data={"vqa": questions},
        held_out={"vqa": dataclasses.replace(questions, split="unseen")},
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0, weight_decay_exclude=()),
        training=TrainingConfig(
            steps=2,
            log_every=1,
            save_every=1,
            keep_last=1,
            evaluate_batches=1,
            compute_dtype="float32",
        ),
        trackers=(),
        fine_tuning=FineTuningConfig(
            validation_split="unseen", test_split="test", limit=8, max_tokens=2, beam_size=1
        ),
    )


def fine_tune(data: pathlib.Path, model: pathlib.Path, output: pathlib.Path, **flags: Any) -> int:
    config = configuring.to_config(flags.pop("experiment", None) or experiment(data))
    chosen = {"MODEL": str(model), "OUTPUT": str(output), "GRID": GRID, "CONFIG": config} | flags
    return commands.run("fine_tune", **chosen)


def results(output: pathlib.Path) -> dict[str, Any]:
    """The results without their seconds, which differ between runs."""
    found = json.loads((output / "results.json").read_text())
    for cell in found["cells"]:
        assert cell.pop("seconds") > 0
    return found


def weights(export: pathlib.Path) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in to_flat(nnx_state(export)).items()}


def nnx_state(export: pathlib.Path) -> Any:
    from flax import nnx

    return nnx.split(load_flamingo(export).model)[1]


@pytest.fixture(scope="module")
def searched(
    data: pathlib.Path, model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    output = tmp_path_factory.mktemp("search") / "grid"
    assert fine_tune(data, model, output) == 0
    return output


def test_a_grid_runs_from_end_to_end(searched: pathlib.Path) -> None:
    found = results(searched)
    names = [f"steps={steps},unfreeze_encoder={u}" for u in ("false", "true") for steps in (2, 4)]
    assert [cell["name"] for cell in found["cells"]] == names and found["unfinished"] == 0
    scores = [cell["score"]["score"] for cell in found["cells"]]
    assert found["best"] == names[scores.index(max(scores))] and found["test"]["records"] == 24
    assert all(cell["score"]["records"] == 8 and cell["loss"] > 0 for cell in found["cells"])
    # More steps of training on nearly the same texts: a lower held-out loss.
    losses = [cell["loss"] for cell in found["cells"]]
    assert losses[1] < losses[0] and losses[3] < losses[2]
    rows = (searched / "results.md").read_text().splitlines()
    assert rows[0].startswith("| unfreeze_encoder | steps | loss | vqa_accuracy (95 %) |")
    assert len(rows) == 2 + 4 + 1 and "best" in "".join(rows) and "test, 24 records" in rows[-1]


def test_the_encoder_moves_only_where_it_is_trained(
    searched: pathlib.Path, model: pathlib.Path
) -> None:
    before = weights(model)
    for cell in results(searched)["cells"]:
        after = weights(searched / "cells" / cell["name"] / "export")
        moved = {n.split("/")[0] for n in before if not np.array_equal(before[n], after[n])}
        trained = {"resampler", "visual_projection", "gated_xattn", "extra_embedding"}
        if cell["settings"]["unfreeze_encoder"]:
            trained |= {"vision_encoder"}
        assert moved == trained
    best = weights(searched / "best")
    cell = weights(searched / "cells" / results(searched)["best"] / "export")
    assert all(np.array_equal(best[name], cell[name]) for name in before)


@pytest.mark.scale
def test_a_killed_search_goes_on_to_the_same_table(
    searched: pathlib.Path,
    data: pathlib.Path,
    model: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, saves, output = Run.save, [], tmp_path / "grid"

    def save(run: Run) -> None:
        real(run)
        saves.append(run.step)
        if len(saves) == 4:  # In the second cell, after two of its four steps.
            run.close()
            raise KilledError

    monkeypatch.setattr(Run, "save", save)
    with pytest.raises(KilledError):
        fine_tune(data, model, output)
    partly = json.loads((output / "results.json").read_text())
    assert saves == [1, 2, 1, 2] and partly["unfinished"] == 3 and partly["test"] is None
    assert fine_tune(data, model, output) == 0
    # The first cell was not trained again, and the second one from its third step.
    assert saves[4:] == [3, 4, 1, 2, 1, 2, 3, 4]
    assert results(output) == results(searched)
    before = (output / "results.md").read_text()
    assert fine_tune(data, model, output) == 0
    assert len(saves) == 12 and (output / "results.md").read_text() == before


def test_another_image_size_interpolates_the_positions(
    data: pathlib.Path, model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert fine_tune(data, model, tmp_path / "g", GRID=["image_size=64"], IMAGE_SIZE=48) == 0
    loaded = load_flamingo(tmp_path / "g" / "best")
    assert loaded.config.vision.image_size == 64
    table = "vision_encoder/position_embedding"
    np.testing.assert_allclose(
        weights(tmp_path / "g" / "best")[table],
        resize_positions(weights(model)[table], 4, 4),
        atol=1e-6,
    )


def test_bad_input_is_told_before_anything_is_made(
    data: pathlib.Path, model: pathlib.Path, searched: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    def changed(**changes: Any) -> Experiment:
        made = experiment(data)
        scoring = dataclasses.replace(made.fine_tuning, **changes)
        return dataclasses.replace(made, fine_tuning=scoring)

    refused: dict[str, dict[str, Any]] = {
        "there is no such key, did you mean learning_rate": {"GRID": ["learnin_rate=1"]},
        "an image size of 40 does not divide into the encoder's cells of 16": {"IMAGE_SIZE": 40},
        "has no split 'dev'": {"experiment": changed(validation_split="dev")},
        "which scores pairs or videos": {"experiment": changed(metric="cider")},
        "roc_auc needs two": {"experiment": changed(metric="roc_auc")},
        "batch_size is 0, but must be 1 or more": {"GRID": ["batch_size=0"]},
        "name its export with --model": {"MODEL": ""},
    }
    for sentence, flags in refused.items():
        with pytest.raises(UserError, match=sentence):
            fine_tune(data, model, tmp_path / "none", **flags)
    assert not (tmp_path / "none").exists()
    other = dataclasses.replace(experiment(data), seed=1)
    with pytest.raises(UserError, match="was trained with config.seed = 0, but it is 1 now"):
        fine_tune(data, model, searched, experiment=other)
