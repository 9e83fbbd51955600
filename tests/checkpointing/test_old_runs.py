"""What was written before fields, classes and files had their names of now is read: a run of four
steps, its export, and what was made of them then.
"""

import hashlib
import json
import pathlib
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.checkpointing.checkpoints import Checkpoints
from flamingo_jax.checkpointing.export import open_export
from flamingo_jax.configuring import from_json
from flamingo_jax.experiment import Experiment, MeshConfig
from flamingo_jax.inference.loading import load_flamingo
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.training.pretrained import require_same_pretrained
from flamingo_jax.training.run import require_same_run
from flamingo_jax.training.setup import make_setup

ARCHIVE = pathlib.Path(__file__).parent / "fixtures" / "before_house.tar.xz"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """run/, export/, digests.json (SHA-256 of every array of the checkpoint) and answers.npz
    (logits of the export on made inputs).
    """
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def experiment(old: pathlib.Path) -> Experiment:
    return from_json(Experiment, json.loads((old / "run" / "config.json").read_text()))


def test_an_old_config_has_the_fields_of_now(old: pathlib.Path) -> None:
    config = experiment(old)
    assert config.optimizer.learning_rate == 1e-2
    assert config.optimizer.boundaries == (3,) and config.optimizer.weight_decay_on_vectors
    assert config.flamingo is not None
    assert config.flamingo.language_model.layers == 2


def test_an_old_checkpoint_is_restored_to_the_bit(old: pathlib.Path) -> None:
    config = experiment(old)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        setup = make_setup(config, mesh)
        checkpoints = Checkpoints(old / "run" / "checkpoints", keep_last=1)
        assert checkpoints.latest() == 4
        state = checkpoints.restore(4, setup.state)
        extra = checkpoints.extra(4)
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): hashlib.sha256(
            np.asarray(leaf).tobytes()
        ).hexdigest()
        for path, leaf in leaves
        if leaf.size
    }
    expected = json.loads((old / "digests.json").read_text())
    assert {name: found.get(name) for name in expected} == expected

    frozen = {part: {"folder": "random", "digest": "seed 5"} for part in extra["pretrained"]}
    assert sorted(frozen) == ["language_model", "vision_encoder"]
    require_same_pretrained(extra["pretrained"], frozen, old)
    require_same_run(from_json(Experiment, extra["experiment"]), config, old)
    assert extra["positions"] == {"ltip": {"global_next_index": 16}}


def test_an_old_export_gives_the_same_logits(old: pathlib.Path) -> None:
    loaded = load_flamingo(old / "export")
    with np.load(old / "answers.npz") as answers:
        given = {name: jnp.asarray(answers[name]) for name in answers.files}

    @nnx.jit
    def answer(model: Flamingo, given: dict[str, jax.Array]) -> jax.Array:
        images = given["images"]
        visual_tokens = model.encode_visuals(images, jnp.ones(images.shape[:2], bool))
        text = ("tokens", "positions", "segments", "media_index")
        return model(*(given[name] for name in text), visual_tokens, given["visuals"])

    logits = answer(loaded.model, {n: a for n, a in given.items() if n != "logits"})
    np.testing.assert_allclose(logits, given["logits"], rtol=1e-5, atol=1e-5)


def test_an_old_export_is_whole(old: pathlib.Path) -> None:
    export = open_export(old / "export")
    export.verify()
    assert export.kind == "flamingo" and export.tokenizer_file is not None
