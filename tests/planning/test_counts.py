"""Parameter counts against the published figures (Flamingo table 5, Brock et al. 2021 table 6)."""

import dataclasses
import importlib
import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest
from flax import nnx

from flamingo_jax.configuring import from_config
from flamingo_jax.experiment import Experiment, MeshConfig, VisionConfig
from flamingo_jax.models.nfnet import NFNet
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.planning.counts import checkpoint_bytes, count_parameters, count_parts
from flamingo_jax.training.setup import make_setup
from tests.training import world

ROOT = pathlib.Path(__file__).parents[2]
SHARED = {"vision_encoder": 435.3e6, "resampler": 193.7e6}
PUBLISHED = {
    "flamingo_3b": {"gated_xattn": 1.208e9, "language_model": 1.374e9, "total": 3.21e9},
    "flamingo_9b": {"gated_xattn": 1.611e9, "language_model": 7.110e9, "total": 9.35e9},
    "flamingo_80b": {"gated_xattn": 9.664e9, "language_model": 70.06e9, "total": 80.35e9},
}
CLASSIFIERS = {
    "F0": 71.49,
    "F1": 132.63,
    "F2": 193.78,
    "F3": 254.92,
    "F4": 316.07,
    "F5": 377.21,
    "F6": 438.36,
}
"""Millions of parameters with the classifier of 1,000 classes."""


def load(name: str) -> Experiment:
    return from_config(Experiment, importlib.import_module(f"configs.{name}").get_config())


@pytest.mark.parametrize("name", PUBLISHED)
def test_flamingos(name: str) -> None:
    counts = count_parameters(load(name))
    for part, published in (SHARED | PUBLISHED[name]).items():
        assert counts[part] == pytest.approx(published, rel=5e-3), part
    assert counts["trainable"] == sum(
        counts[part]
        for part in ("resampler", "gated_xattn", "visual_projection", "extra_embedding")
    )
    assert (
        counts["total"] == counts["trainable"] + counts["vision_encoder"] + counts["language_model"]
    )


PUBLISHED_ABLATIONS = {
    "baseline": 3.2,
    "no_gating": 3.2,
    "vanilla_xattn": 2.4,
    "grafting": 3.3,
    "single_middle": 2.0,
    "every_4th": 2.3,
    "every_2nd": 2.6,
    "mlp": 3.2,
    "transformer": 3.2,
    "small_resampler": 3.1,
    "large_resampler": 3.4,
    "clip_l14": 3.1,
    "nfnet_f0": 2.9,
}
"""Billions of parameters in the tables 3 and 10 of rows with a model of their own; all other
rows are the baseline's 3.2, or CLIP's 3.1.
"""
NEITHER_OF_BOTH = {"single_middle": 2.056, "nfnet_f0": 2.848}
"""What the baseline's own parts make of two rows, further off than 2 % or than rounding."""


@pytest.mark.parametrize("form", PUBLISHED_ABLATIONS)
def test_ablations(form: str) -> None:
    """Within 2 % and within what the tables' rounding hides, but for two rows."""
    config = importlib.import_module("configs.ablations").get_config(f"form={form}")
    counts, published = count_parameters(from_config(Experiment, config)), PUBLISHED_ABLATIONS[form]
    total = counts["total"] / 1e9
    if form in NEITHER_OF_BOTH:
        assert total == pytest.approx(NEITHER_OF_BOTH[form], abs=1e-3)
        assert abs(total - published) < 0.02 * published + 0.05
    else:
        assert abs(total - published) < min(0.02 * published, 0.05)


def test_rows_without_a_model_of_their_own_have_the_baselines_or_clips() -> None:
    ablations = importlib.import_module("configs.ablations")
    models = {
        form: from_config(Experiment, ablations.get_config(f"form={form}")).flamingo
        for form in ablations.ABLATIONS
    }
    for form in ablations.ABLATIONS.keys() - PUBLISHED_ABLATIONS.keys() - {"all_previous"}:
        assert models[form] in (models["baseline"], models["clip_l14"]), form
    assert len({repr(models[form]) for form in PUBLISHED_ABLATIONS}) == len(PUBLISHED_ABLATIONS)


def test_what_is_unfrozen_counts_as_trained() -> None:
    config = importlib.import_module("configs.ablations").get_config("form=lm_scratch,size=tiny")
    parts = count_parts(from_config(Experiment, config))
    assert parts["language_model"].trained == parts["language_model"].parameters > 0
    assert parts["vision_encoder"].trained == 0


def test_a_stage_that_trains_everything() -> None:
    assert count_parameters(load("lm_70b")) == {
        "language_model": 70_057_992_192,
        "trainable": 70_057_992_192,
        "total": 70_057_992_192,
    }


@pytest.mark.parametrize("variant", CLASSIFIERS)
def test_nfnets(variant: str) -> None:
    model = nnx.eval_shape(
        lambda: NFNet(dataclasses.replace(VisionConfig(), variant=variant), rngs=nnx.Rngs(0))
    )
    body = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))
    assert (body + (model.width + 1) * 1_000) / 1e6 == pytest.approx(CLASSIFIERS[variant], rel=5e-3)


def test_a_checkpoint_of_the_80b_model() -> None:
    experiment = load("flamingo_80b")
    counts, sizes = count_parameters(experiment), checkpoint_bytes(experiment)
    # Each trained parameter and Adam's two moments of it, in float32; frozen ones in bfloat16
    # stay outside.
    assert (
        sizes["trainables"] == 4 * counts["trainable"]
        and sizes["moments"] == 8 * counts["trainable"]
    )
    assert sizes["frozen"] == 2 * (counts["total"] - counts["trainable"])
    assert (
        sizes["total"]
        == sizes["trainables"] + sizes["moments"] + sizes["rest"]
        == pytest.approx(120e9, rel=0.02)
    )
    assert 0 < sizes["rest"] < 100


@pytest.mark.parametrize("unfreeze", [False, True])
def test_a_checkpoint_is_as_large_as_the_state_that_is_restored(unfreeze: bool) -> None:
    experiment = world.experiment()
    experiment = dataclasses.replace(
        experiment,
        training=dataclasses.replace(experiment.training, unfreeze_vision_encoder=unfreeze),
    )
    setup = make_setup(experiment, make_mesh(MeshConfig(fsdp=2, model=2)))
    sizes = checkpoint_bytes(experiment)
    assert sizes["total"] == sum(
        shape.size * shape.dtype.itemsize for shape in jax.tree.leaves(setup.state)
    )
    assert sizes["moments"] == 2 * sizes["trainables"]
    assert sizes["trainables"] == sum(4 * shape.size for shape in setup.trainable.values())
    assert sizes["frozen"] == sum(4 * shape.size for shape in setup.frozen.values())


def test_the_command_says_so() -> None:
    def printed(*arguments: str) -> str:
        command = [
            sys.executable,
            "-m",
            "launch.plan",
            "--config=configs/flamingo_80b.py",
            "--counts",
            *arguments,
        ]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    experiment = load("flamingo_80b")
    trained = {part: count.trained for part, count in count_parts(experiment).items()}
    assert json.loads(printed("--json")) == {
        "parameters": count_parameters(experiment),
        "trained": trained,
        "checkpoint": checkpoint_bytes(experiment),
    }
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in printed().splitlines()
        if "│" in line
    ]
    assert ["the whole checkpoint", "118.4 GB"] in rows and [
        "frozen parameters, not in it",
        "141 GB",
    ] in rows
