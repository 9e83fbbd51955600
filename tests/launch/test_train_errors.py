"""Training refuses bad input in one sentence, before it writes anything."""

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from data_pipelines.build.synthetic_world import WorldSource, build_quickstart
from data_pipelines.build.writer import write_dataset
from flamingo_jax import configuring
from flamingo_jax.checkpointing.checkpoints import Checkpoints
from flamingo_jax.checkpointing.export import export_model
from flamingo_jax.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.processing.tokenizer import FILE_NAME
from flamingo_jax.training import loop
from tests.end_to_end import small
from tests.launch import commands

ROOT = pathlib.Path(__file__).parents[2]
Train = Callable[..., int]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("world")
    build_quickstart(folder, limit=8)
    return folder


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Train:
    """(experiment, workdir, **config keys with __ for a dot) -> what the command's main
    returns.
    """
    command = commands.load("train")

    def run(
        experiment: Experiment,
        workdir: pathlib.Path | None,
        prepare: bool = False,
        **overrides: Any,
    ) -> int:
        config = configuring.to_config(experiment)
        config.update_from_flattened_dict(
            {key.replace("__", "."): value for key, value in overrides.items()}
        )
        monkeypatch.setattr(command, "CONFIG", commands.flag(config))
        monkeypatch.setattr(command, "WORKDIR", commands.flag(workdir and str(workdir)))
        monkeypatch.setattr(command, "PREPARE", commands.flag(prepare))
        return command.main()

    return run


def refused(
    train: Train,
    sentence: str,
    experiment: Experiment,
    workdir: pathlib.Path | None,
    **overrides: Any,
) -> None:
    with pytest.raises(UserError) as caught:
        train(experiment, workdir, **overrides)
    message = str(caught.value)
    assert caught.value.exit_code == EXIT_BAD_INPUT and sentence in message and "\n" not in message


def test_prepare_needs_no_language_model_and_trains_nothing(
    train: Train, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    experiment = small.flamingo(data)
    missing = {"language_model_from": str(tmp_path / "later")}
    assert train(experiment, tmp_path / "run", prepare=True, **missing) == 0
    assert not (tmp_path / "run").exists()
    refused(
        train,
        "which is no folder: run the language_model stage",
        experiment,
        tmp_path / "run",
        **missing,
    )


def test_the_command_line(tmp_path: pathlib.Path) -> None:
    def call(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "launch.train", *arguments],
            cwd=ROOT,
            env=os.environ,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    code, out, err = call("--help")
    assert code == 0 and err == "" and "--config" in out and "--workdir" in out
    for override in ("--config.training.stps=3", "--config.data.text.batch_size=3"):
        code, out, err = call(
            "--config=configs/quickstart.py:language_model",
            f"--workdir={tmp_path}/run",
            override,
        )
        assert (
            code == EXIT_BAD_INPUT
            and out == ""
            and err.startswith("error: config.")
            and err.count("\n") == 1
        )
    assert not (tmp_path / "run").exists()


def test_without_a_workdir(train: Train, data: pathlib.Path) -> None:
    refused(train, "--workdir is not set", small.language_model(data), None)


@pytest.mark.parametrize(
    ("sentence", "overrides"),
    [
        (
            "config.data.text.batch_size is 6, but 8 (data) x 1 (fsdp) devices share it",
            {"data__text__batch_size": 6},
        ),
        ("does not fit 8 devices", {"mesh__model": 3}),
        ("nowhere", {"data__text__path": "nowhere"}),
        ("'trian'", {"data__text__split": "trian"}),
        ("nowhere", {"tokenizer": "nowhere"}),
        (
            "config.language_model.vocab_size is 500, but the tokenizer",
            {"language_model__vocab_size": 500},
        ),
        ("config.contrastive is empty", {"task": "contrastive"}),
        ("reads datasets of kind text", {"data__text__kind": "pairs"}),
        ("config.training.save_every is 0, but must be 1 or more", {"training__save_every": 0}),
    ],
)
def test_what_does_not_fit_is_refused(
    train: Train,
    data: pathlib.Path,
    tmp_path: pathlib.Path,
    sentence: str,
    overrides: dict[str, Any],
) -> None:
    refused(train, sentence, small.language_model(data), tmp_path / "run", **overrides)
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_a_file(train: Train, data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").touch()
    refused(train, "is a file: name a folder", small.language_model(data), tmp_path / "run")


def test_another_tokenizer_of_the_same_size(
    train: Train, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    other = tmp_path / "other.model"
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((data / "tokenizer" / FILE_NAME).read_bytes())
    model.pieces[-1].score -= 1
    other.write_bytes(model.SerializeToString())
    assert train(small.language_model(data), tmp_path / "run", training__steps=1) == 0
    refused(
        train,
        f"is not {tmp_path}/run/tokenizer.model",
        small.language_model(data),
        tmp_path / "run",
        tokenizer=str(other),
    )
    base = tmp_path / "base"
    export_model(
        base,
        kind="language_model",
        config=configuring.to_json(small.LANGUAGE_MODEL),
        parameters={"a": np.zeros(2)},
        tokenizer_file=other,
    )
    refused(
        train,
        f"is not {base}/tokenizer.model",
        small.flamingo(data),
        tmp_path / "flamingo",
        language_model_from=str(base),
    )


def test_an_empty_dataset_folder(train: Train, data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(
        train,
        f"{tmp_path}/empty",
        small.language_model(data),
        tmp_path / "run",
        data__text__path=str(tmp_path / "empty"),
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["", "missing", "folder", "language_model", "contrastive"])
def test_exports_that_are_missing_or_wrong(
    train: Train, data: pathlib.Path, tmp_path: pathlib.Path, kind: str
) -> None:
    base = tmp_path / "base"
    if kind == "folder":
        base.mkdir()
    elif kind in ("language_model", "contrastive"):
        # The second is of the right kind, but of another encoder.
        export_model(
            base,
            kind=kind,
            config={"vision": {"variant": "F0"}},
            parameters={"a": np.zeros(2, np.float32)},
        )
    sentence = {
        "": "config.vision_encoder_from is empty",
        "missing": "which is no folder: run the contrastive stage",
        "folder": f"{base} is no export of this project",
        "language_model": (
            f"{base} holds a language_model export, but config.vision_encoder_from needs one of"
            " kind contrastive"
        ),
        "contrastive": f"{base} was trained with",
    }[kind]
    refused(
        train,
        sentence,
        small.flamingo(data),
        tmp_path / "run",
        vision_encoder_from=str(base) if kind else "",
    )
    assert not (tmp_path / "run").exists()


def test_a_foreign_checkpoint_is_refused_and_left_as_it_is(
    train: Train, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert train(small.language_model(data), tmp_path, training__steps=1) == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    refused(
        train,
        "config.language_model.feed_forward.width = 32, but it is 48 here",
        small.language_model(data),
        tmp_path,
        language_model__feed_forward__width=48,
    )
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_signal_is_exit_code_75(
    train: Train, data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "train", lambda *_: loop.TrainResult(3, preempted=True))
    assert train(small.language_model(data), tmp_path) == EXIT_PREEMPTED


def test_a_dataset_that_was_rebuilt_between_two_starts_is_refused(
    train: Train, data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One record more: from the first batch on, other rows would come at every position."""
    text = shutil.copytree(data / "text", tmp_path / "data" / "text")
    here = {"data__text__path": str(text)}
    assert train(small.language_model(data), tmp_path / "run", training__steps=1, **here) == 0
    shutil.rmtree(text)
    write_dataset(text, WorldSource("text", 0, 9))
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    sentence = f"the train split of {text} (config.data.text) has other content (9 records in"
    refused(
        train, sentence, small.language_model(data), tmp_path / "run", training__steps=2, **here
    )
    now = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert now == before
    shutil.rmtree(text)
    shutil.copytree(data / "text", text)
    # A checkpoint of an earlier version, which knows no identities, is taken.
    known = Checkpoints.extra

    def forgets(self, step):
        return {k: v for k, v in known(self, step).items() if k != "datasets"}

    monkeypatch.setattr(Checkpoints, "extra", forgets)
    assert train(small.language_model(data), tmp_path / "run", training__steps=2, **here) == 0
