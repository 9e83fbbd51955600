"""A frozen language model is trained by low-rank updates alone, and exported with them in its
matrices.
"""

import dataclasses
import pathlib

import numpy as np
import pytest

from flamingo_jax.checkpointing.export import Export
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import LoRAConfig, MeshConfig, PositionsConfig
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.tasks import stages
from flamingo_jax.tasks.flops import step_cost
from flamingo_jax.training.setup import make_setup
from flamingo_jax.training.trained_run import load_trained_run
from tests.end_to_end import small
from tests.end_to_end.test_frozen import run

LORA = LoRAConfig(rank=2, alpha=4.0, targets=("attention/(query|out)", "feed_forward/down"))
UPDATED = ("layers/attention/query", "layers/attention/out", "layers/feed_forward/down")


@pytest.fixture(scope="module")
def base(data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    training = dataclasses.replace(small.TRAINING, steps=1)
    return run(small.language_model(data, training=training), tmp_path_factory.mktemp("base"))


def test_a_language_model_is_tuned_by_updates_alone(
    base: Export, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    training = dataclasses.replace(small.TRAINING, steps=3, lora=LORA)
    experiment = small.language_model(data, training=training, language_model_from=str(base.folder))
    tuned = run(experiment, tmp_path)
    updates = load_trained_run(tmp_path).trainable
    assert set(updates) == {
        f"{name}/{part}" for name in UPDATED for part in ("lora_down", "lora_up")
    }
    before, after = base.read(), tuned.read()
    assert before.keys() == after.keys()
    for name in before:
        if name not in UPDATED:
            np.testing.assert_array_equal(after[name], before[name])
            continue
        down, up = (
            np.asarray(updates[f"{name}/{part}"], np.float64) for part in ("lora_down", "lora_up")
        )
        assert np.abs(up).max() > 0
        layers = np.stack([np.tensordot(d, u, 1) for d, u in zip(down, up, strict=True)])
        np.testing.assert_allclose(
            after[name], before[name] + 4.0 / 2 * layers, rtol=1e-5, atol=1e-6
        )


def test_a_flamingo_trains_its_language_model_by_updates_as_well(data: pathlib.Path) -> None:
    plain = small.flamingo(data)
    experiment = dataclasses.replace(plain, training=dataclasses.replace(plain.training, lora=LORA))
    mesh = make_mesh(MeshConfig())
    setup, before = make_setup(experiment, mesh), make_setup(plain, mesh)
    added = set(setup.trainable) - set(before.trainable)
    assert added == {
        f"language_model/{name}/{part}" for name in UPDATED for part in ("lora_down", "lora_up")
    }
    sizes = sum(int(np.prod(setup.trainable[name].shape)) for name in added)
    assert step_cost(experiment).token == step_cost(plain).token + 6 * sizes


def test_rows_are_no_longer_than_learned_positions(data: pathlib.Path) -> None:
    learned = PositionsConfig("learned", max_length=31)
    experiment = small.language_model(
        data, language_model=dataclasses.replace(small.LANGUAGE_MODEL, positions=learned)
    )
    with pytest.raises(UserError, match=r"config.data.text.max_length is 32, but .* learned 31"):
        make_setup(experiment, make_mesh(MeshConfig()))


def test_what_does_not_go_with_updates_is_told(data: pathlib.Path) -> None:
    training = dataclasses.replace(small.TRAINING, lora=LORA)
    with pytest.raises(UserError, match="config.language_model_from is empty"):
        stages.frozen_parts(small.language_model(data, training=training))
    with pytest.raises(UserError, match="task 'contrastive' has none"):
        stages.lora(small.contrastive(data, training=training))
    both = dataclasses.replace(training, unfreeze_language_model=True)
    with pytest.raises(UserError, match="turn one of them off"):
        stages.lora(small.flamingo(data, training=both))
