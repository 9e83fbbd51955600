"""An export of what was trained alone, with the frozen parts by reference, is the same model as
the complete export; a part that is missing, moved or another one is told in a sentence.
"""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from flax import nnx

import flamingo_jax as fj
from flamingo_jax.checkpointing.export import Export, open_export
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment, LoRAConfig, ViTConfig
from flamingo_jax.inference.loading import load_flamingo
from flamingo_jax.interop.weight_sources import open_model
from flamingo_jax.planning.export_timing import write_run
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.pytrees import to_flat
from flamingo_jax.tasks import stages
from flamingo_jax.training.exporting import export_run
from flamingo_jax.training.trained_run import load_exported_run
from tests.end_to_end import small
from tests.end_to_end.test_frozen import run
from tests.launch import commands

TRAINING = dataclasses.replace(small.TRAINING, steps=1)
LORA = LoRAConfig(rank=2, alpha=4.0, targets=("attention/(query|out)", "feed_forward/down"))


@dataclasses.dataclass(frozen=True)
class Runs:
    """The folders of a Flamingo's parts, its run, and its complete and its small export."""

    parts: dict[str, pathlib.Path]
    experiment: Experiment
    whole: Export
    small: Export


def write(experiment: Experiment, workdir: pathlib.Path) -> pathlib.Path:
    """Writes the workdir of a run with random parameters, without training."""
    workdir.mkdir(parents=True)
    parts = {
        part.name: {
            "folder": part.folder,
            "digest": part.folder if part.folder == "random" else open_export(part.folder).digest,
        }
        for part in stages.frozen_parts(experiment)
    }
    Tokenizer.load(experiment.tokenizer).save(workdir)
    write_run(experiment, workdir, parts)
    return workdir


def exported(experiment: Experiment, workdir: pathlib.Path) -> Export:
    """The complete export of such a run."""
    export_run(write(experiment, workdir), workdir / "export")
    return open_export(workdir / "export")


@pytest.fixture(scope="module")
def runs(data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A Flamingo with low-rank updates of its language model, on larger images than its encoder
    was trained on, in bfloat16, so that nothing of the parts is exported as it is in them.
    """
    root = tmp_path_factory.mktemp("runs")
    vit = dataclasses.replace(
        small.VISION, vit=ViTConfig(patch_size=8, layers=1, width=16, heads=2, feed_forward=32)
    )
    contrastive = small.contrastive(data)
    assert contrastive.contrastive is not None
    contrastive = dataclasses.replace(
        contrastive, contrastive=dataclasses.replace(contrastive.contrastive, vision=vit)
    )
    encoder = exported(contrastive, root / "contrastive")
    language_model = exported(small.language_model(data), root / "language_model")
    experiment = small.pages(
        data,
        training=dataclasses.replace(TRAINING, lora=LORA, steps=2, compute_dtype="bfloat16"),
        vision_encoder_from=str(encoder.folder),
        language_model_from=str(language_model.folder),
    )
    assert experiment.flamingo is not None
    larger = dataclasses.replace(vit, image_size=48)
    experiment = dataclasses.replace(
        experiment, flamingo=dataclasses.replace(experiment.flamingo, vision=larger)
    )
    whole = exported(experiment, root / "flamingo")
    export_run(root / "flamingo", root / "small", trained_only=True)
    return Runs(
        {"vision_encoder": encoder.folder, "language_model": language_model.folder},
        experiment,
        whole,
        open_export(root / "small"),
    )


def test_it_holds_what_was_trained_and_names_the_rest(runs: Runs) -> None:
    names = set(runs.small.names)
    assert {name.split("/")[0] for name in names} == {
        "resampler",
        "visual_projection",
        "gated_xattn",
        "extra_embedding",
        "language_model",
        "vision_encoder",
    }
    # It was made larger for this run, so that no folder has it.
    assert [name for name in names if name.startswith("vision_encoder/")] == [
        "vision_encoder/position_embedding"
    ]
    assert {name for name in names if name.startswith("language_model/")} == {
        f"language_model/layers/{matrix}/{factor}"
        for matrix in ("attention/query", "attention/out", "feed_forward/down")
        for factor in ("lora_down", "lora_up")
    }
    saved = json.loads((runs.small.folder / "config.json").read_text())["parts"]
    for part, folder in runs.parts.items():
        assert saved[part]["folder"] == str(folder)
        assert saved[part]["digest"] == open_export(folder).digest
    card = (runs.small.folder / "README.md").read_text()
    assert str(runs.parts["language_model"]) in card and "no: named by its digest" in card
    assert "2 of 2" in card and "rank 2" in card


def test_it_is_the_same_model(runs: Runs) -> None:
    whole, by_reference = state(runs.whole.folder), state(runs.small.folder)
    assert list(whole) == list(by_reference)
    for name, value in whole.items():
        assert by_reference[name].dtype == value.dtype, name
        if f"{name}/lora_up" in runs.small.names:
            # Layer by layer in the export, all layers at once when it is loaded.
            require_close(by_reference[name], value)
        else:
            np.testing.assert_array_equal(by_reference[name], value, err_msg=name)


def require_close(found: np.ndarray, wanted: np.ndarray) -> None:
    """Compares values of bfloat16 that were rounded from nearly the same sums."""
    np.testing.assert_allclose(np.float32(found), np.float32(wanted), rtol=2**-7, atol=1e-6)


def state(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of the model in a folder."""
    found = to_flat(nnx.state(load_flamingo(folder).model))
    return {name: np.asarray(value) for name, value in found.items()}


def test_parts_that_were_moved_are_named(runs: Runs) -> None:
    moved = {
        part: folder.rename(folder.with_name(f"{part}-moved"))
        for part, folder in runs.parts.items()
    }
    try:
        with pytest.raises(UserError, match=r"needs the .* which is no folder.*--parts="):
            fj.load(runs.small.folder)
        model = fj.load(runs.small.folder, parts=moved)
        assert model.digest == runs.small.digest
        found = load_exported_run(runs.small.folder, {p: str(f) for p, f in moved.items()})
        assert found.trainable and found.frozen
    finally:
        for part, folder in moved.items():
            folder.rename(runs.parts[part])


def test_other_parts_are_refused(runs: Runs, tmp_path: pathlib.Path) -> None:
    other = dict(runs.parts) | {"language_model": runs.whole.folder}
    with pytest.raises(UserError, match="was trained on another language model .digest"):
        fj.load(runs.small.folder, parts=other)
    with pytest.raises(UserError, match="parts names a folder for 'resampler'"):
        fj.load(runs.small.folder, parts={"resampler": tmp_path})
    with pytest.raises(UserError, match="needs no part from elsewhere"):
        fj.load(runs.whole.folder, parts=runs.parts)


@pytest.mark.scale
def test_a_run_goes_on_from_it(runs: Runs, tmp_path: pathlib.Path) -> None:
    """`flamingo_from` takes the complete and the small export: the same first loss, and exports
    of the two runs of the same values.
    """

    def continued(folder: pathlib.Path, workdir: pathlib.Path) -> Export:
        experiment = dataclasses.replace(
            runs.experiment,
            training=dataclasses.replace(TRAINING, compute_dtype="bfloat16"),
            flamingo_from=str(folder),
            vision_encoder_from="",
            language_model_from="",
        )
        return run(experiment, workdir)

    whole = continued(runs.whole.folder, tmp_path / "whole")
    by_reference = continued(runs.small.folder, tmp_path / "small")
    expected, found = whole.read(), by_reference.read()
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(np.float32(found[name]), np.float32(value), rtol=2e-2, atol=1e-3)
    # The small export of that run names the small export of the first.
    export_run(tmp_path / "small", tmp_path / "again", trained_only=True)
    again = open_model(tmp_path / "again")
    assert again.export.parts["language_model"].folder == str(runs.small.folder)
    loaded = state(tmp_path / "again")
    for name, value in state(by_reference.folder).items():
        require_close(loaded[name], value)


def test_the_command_says_where_nothing_is_frozen_or_random(
    data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    def refused(experiment: Experiment, name: str) -> str:
        write(experiment, tmp_path / name)
        with pytest.raises(UserError) as caught:
            commands.run(
                "export",
                WORKDIR=str(tmp_path / name),
                OUTPUT=str(tmp_path / "export"),
                TRAINED_ONLY=True,
            )
        assert not list(tmp_path.glob("export*"))
        return str(caught.value)

    assert "all of its model was trained" in refused(
        small.language_model(data, training=TRAINING), "language_model"
    )
    assert "is random" in refused(small.pages(data, training=TRAINING), "flamingo")
