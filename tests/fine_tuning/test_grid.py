"""Grids: keys and values, the cells and their experiments, without any model."""

import dataclasses
import math
import pathlib

import pytest

from configs import fine_tune
from flamingo_jax.configuring import from_config
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment, OptimizerConfig, VisionConfig, ViTConfig
from flamingo_jax.fine_tuning.checks import cell_side, require_same_cell
from flamingo_jax.fine_tuning.grid import Axis, cells, parse_grid


@pytest.fixture(scope="module")
def vqav2() -> Experiment:
    return from_config(Experiment, fine_tune.get_config("vqav2"))


def made(experiment: Experiment, *texts: str) -> list[Experiment]:
    return [cell.experiment for cell in cells(parse_grid(texts, experiment), experiment)]


def test_values_have_the_types_of_their_keys(vqav2: Experiment) -> None:
    texts = ["learning_rate=1e-5,3e-6", "unfreeze_encoder=false,true", "training.loss=token_mean"]
    assert parse_grid(texts, vqav2) == [
        Axis("learning_rate", (1e-5, 3e-6)),
        Axis("unfreeze_encoder", (False, True)),
        Axis("training.loss", ("token_mean",)),
    ]


def test_all_combinations_are_cells_the_last_axis_fastest(vqav2: Experiment) -> None:
    found = cells(parse_grid(["batch_size=8,16", "learning_rate=1e-5,3e-8"], vqav2), vqav2)
    assert [cell.name for cell in found] == [
        "batch_size=8,learning_rate=1e-05",
        "batch_size=8,learning_rate=3e-08",
        "batch_size=16,learning_rate=1e-05",
        "batch_size=16,learning_rate=3e-08",
    ]
    assert [cell.experiment.data["vqav2"].batch_size for cell in found] == [8, 8, 16, 16]
    assert [c.experiment.optimizer.learning_rate for c in found] == [1e-5, 3e-8, 1e-5, 3e-8]
    (alone,) = cells([], vqav2)
    assert alone.name == "default" and alone.experiment == vqav2


def test_a_name_does_not_depend_on_the_order_of_the_axes(vqav2: Experiment) -> None:
    for texts in (["steps=8", "batch_size=4"], ["batch_size=4", "steps=8"]):
        assert [c.name for c in cells(parse_grid(texts, vqav2), vqav2)] == ["batch_size=4,steps=8"]


def test_the_schedule_keeps_its_form_with_other_steps(vqav2: Experiment) -> None:
    short, long = made(vqav2, "steps=200,4000")
    assert short.training.steps == 200 and short.optimizer.warmup_steps == 2
    assert short.optimizer.boundaries == (100, 150)
    assert long.optimizer.warmup_steps == 40 and long.optimizer.boundaries == (2000, 3000)
    # A key of the config wins, wherever it is in the grid.
    (given,) = made(vqav2, "optimizer.warmup_steps=7", "steps=200")
    assert given.optimizer.warmup_steps == 7


def test_augmentation_is_colour_and_flips(vqav2: Experiment) -> None:
    found = [e.data["vqav2"] for e in made(vqav2, "augmentation=0,0.3")]
    assert [(d.colour, d.flip) for d in found] == [(0.0, False), (0.3, True)]
    # What is held out is measured on plain images.
    assert not any(e.held_out["vqav2"].flip for e in made(vqav2, "augmentation=0.3"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning_rate", "must be KEY=VALUE"),
        ("learning_rates=1", "there is no such key, did you mean learning_rate?"),
        ("colour=1", "a grid varies steps, learning_rate, batch_size, augmentation"),
        ("optimizer.weight_deca=1", "no key 'weight_deca', did you mean weight_decay"),
        ("optimizer.boundaries=1,2", "this is a tuple of ints, but a grid varies single"),
        ("steps=1e3", "'1e3' must be an int"),
        ("unfreeze_encoder=yes", "'yes' must be true or false"),
        ("steps=2,2", "has a value twice"),
        ("learning_rate=-1", "learning_rate is -1.0, but must be 0 or more"),
        ("augmentation=2", "colour is 2.0, but must be from 0 to 1"),
        ("training.loss=sum", "training.loss is 'sum', but must be one of"),
    ],
)
def test_a_mistake_in_a_grid_is_told(vqav2: Experiment, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        made(vqav2, text)
    assert "\n" not in str(caught.value)


def test_an_axis_is_given_once(vqav2: Experiment) -> None:
    with pytest.raises(UserError, match="--grid=steps is given twice"):
        parse_grid(["steps=1", "steps=2"], vqav2)


def test_the_papers_sizes_and_rates(vqav2: Experiment) -> None:
    """480 pixels are 15 x 15 cells of an NFNet-F6; rates are within the paper's range."""
    assert vqav2.flamingo is not None
    vision = vqav2.flamingo.vision
    assert vision.image_size / cell_side(vision) == 15
    assert 3e-8 <= vqav2.optimizer.learning_rate <= 1e-5
    assert math.isclose(vqav2.optimizer.boundary_factor, 0.1)
    assert vqav2.training.unfreeze_vision_encoder
    assert cell_side(VisionConfig(vit=ViTConfig(patch_size=14))) == 14


def test_another_config_in_a_cells_folder_is_refused(vqav2: Experiment) -> None:
    folder = pathlib.Path("cells/a")
    require_same_cell(folder, vqav2, dataclasses.replace(vqav2, name="x", trackers=()))
    other = dataclasses.replace(
        vqav2, optimizer=OptimizerConfig(**(vars(vqav2.optimizer) | {"learning_rate": 3e-6}))
    )
    with pytest.raises(UserError, match=r"config.optimizer.learning_rate = 1e-06, but it is 3e-06"):
        require_same_cell(folder, vqav2, other)
