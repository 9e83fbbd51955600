"""What a run's evaluators measure as it trains is what launch.evaluate measures after it, on
its checkpoint and on its export.
"""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.evaluator_config import EvaluatorConfig
from flamingo_jax.experiment import (
    DatasetConfig,
    Experiment,
    VisionConfig,
    ViTConfig,
)
from launch.evaluators import measure
from tests.end_to_end import small
from tests.end_to_end.test_frozen import run
from tests.launch import commands

pytestmark = pytest.mark.usefixtures("one_device")

VISION = VisionConfig(
    image_size=32, vit=ViTConfig(patch_size=16, layers=1, width=16, heads=2, feed_forward=32)
)
"""A fifth of the convolutions' time to compile."""
TRAINING = dataclasses.replace(small.TRAINING, steps=3, evaluate_every=2, evaluate_batches=1)


def train(experiment: Experiment, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Trains and exports to folder/export; the lines of its metrics."""
    run(experiment, folder)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def measured(lines: list[dict[str, Any]], name: str) -> dict[int, dict[str, float]]:
    """{step: what the evaluator of this name measured then}."""
    found: dict[int, dict[str, float]] = {}
    for line in lines:
        values = {key: value for key, value in line.items() if key.startswith(f"{name}/")}
        if values:
            found.setdefault(line["step"], {}).update(values)
    return found


@pytest.fixture(scope="module")
def contrastive(
    data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, list[dict[str, Any]]]:
    experiment = small.contrastive(
        data,
        training=TRAINING,
        held_out={
            "ltip": DatasetConfig("pairs", str(data / "ltip"), split="validation", batch_size=8)
        },
        evaluators={
            "found": EvaluatorConfig("retrieval", str(data / "ltip"), limit=20, every=1),
            "named": EvaluatorConfig(
                "zero_shot_classification", str(data / "vqa"), split="test", limit=16
            ),
        },
    )
    assert experiment.contrastive is not None
    model = dataclasses.replace(experiment.contrastive, vision=VISION)
    experiment = dataclasses.replace(experiment, contrastive=model)
    folder = tmp_path_factory.mktemp("contrastive")
    return folder, train(experiment, folder)


def test_each_evaluator_has_its_period_and_the_end(
    contrastive: tuple[pathlib.Path, list[dict[str, Any]]],
) -> None:
    _, lines = contrastive
    found = measured(lines, "found")
    assert list(found) == [1, 2, 3] and list(measured(lines, "named")) == [2, 3]
    assert set(found[3]) == {
        f"found/{way}_recall@{rank}"
        for way in ("image_to_text", "text_to_image")
        for rank in (1, 5, 10)
    }


def test_the_command_measures_the_same(
    contrastive: tuple[pathlib.Path, list[dict[str, Any]]],
    data: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, lines = contrastive
    expected = measured(lines, "found")[3] | measured(lines, "named")[3]
    held_out = measured(lines, "held_out")[3]
    assert held_out["held_out/ltip/loss"] > 0
    # Rounding differs with the mesh: a share of twenty may tip where two are all but equal.
    for where in ({"workdir": str(folder)}, {"model": str(folder / "export")}):
        found = measure(["found", "named", "held_out"], **where)
        assert {key: found[key] for key in expected} == pytest.approx(expected, abs=0.06)
        assert found["held_out/ltip/loss"] == pytest.approx(
            held_out["held_out/ltip/loss"], rel=1e-4
        )
    described = f"kind=retrieval,path={data}/ltip,limit=20"
    evaluate = commands.load("evaluate")
    for name, value in {
        "BENCHMARK": [],
        "SUITE": [],
        "EVALUATOR": [described],
        "MODEL": str(folder / "export"),
        "WORKDIR": "",
    }.items():
        monkeypatch.setattr(evaluate, name, commands.flag(value))
    assert evaluate.main() == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {
        f"retrieval/{key.removeprefix('found/')}": value
        for key, value in found.items()
        if key.startswith("found/")
    }


def test_a_name_that_the_config_does_not_have(
    contrastive: tuple[pathlib.Path, list[dict[str, Any]]],
) -> None:
    with pytest.raises(UserError, match="has no evaluator 'fuond', did you mean found"):
        measure(["fuond"], workdir=str(contrastive[0]))


def test_few_shot_scores_as_training_goes(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    asked = EvaluatorConfig(
        "few_shot",
        str(data / "vqa"),
        split="test",
        support_split="unseen",
        benchmark="classification",
        shots=(2,),
        limit=6,
        batch_size=6,
    )
    once = dataclasses.replace(TRAINING, steps=1)
    experiment = small.pages(data, training=once, evaluators={"shown": asked})
    assert experiment.flamingo is not None
    model = dataclasses.replace(experiment.flamingo, vision=VISION)
    experiment = dataclasses.replace(experiment, flamingo=model)
    found = measured(train(experiment, tmp_path), "shown")
    assert list(found) == [1] and set(found[1]) == {"shown/accuracy@2"}
    assert measure(["shown"], model=str(tmp_path / "export")) == pytest.approx(found[1], abs=0.2)
