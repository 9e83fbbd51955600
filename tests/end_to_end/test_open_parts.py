"""A Flamingo on a made Qwen- or Llama-form language model and a made CLIP tower: through the
same commands, from the folders or from their exports.
"""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import time

import numpy as np
import pytest
import tokenizers

from flamingo_jax import configuring
from flamingo_jax.checkpointing.export import Export, open_export
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment, FlamingoConfig, PositionsConfig
from flamingo_jax.inference.decoding import DecodingConfig
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.loading import load_flamingo
from flamingo_jax.interop.folders import open_folder, read_config
from flamingo_jax.interop.weight_sources import declare
from flamingo_jax.json_lines import read_lines
from flamingo_jax.processing.tokenizer import JSONTokenizer, Tokenizer
from flamingo_jax.training.pretrained import open_frozen_sources
from tests.end_to_end import small, test_kills
from tests.end_to_end.test_frozen import run
from tests.interop import cases
from tests.launch import commands

STEPS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, pathlib.Path]:
    """A language model and a tower whose patches leave a rest."""
    root = tmp_path_factory.mktemp("models")
    return language_model_folder(root / "qwen", "qwen3"), cases.write_folder(
        root / "clip", *cases.fixture("clip")
    )


def language_model_folder(folder: pathlib.Path, case: str) -> pathlib.Path:
    """One whose vocabulary is padded beyond its tokenizer's, without a beginning of text."""
    config, tensors = cases.fixture(case)
    tensors = {
        name: (320, *shape[1:]) if shape[0] == 101 else shape for name, shape in tensors.items()
    }
    cases.write_folder(folder, config | {"vocab_size": 320}, tensors, files=2, dtype=np.float16)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = (
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        tokenizers.decoders.ByteLevel(),
    )
    made.train_from_iterator(
        ["a small red circle"],
        tokenizers.trainers.BpeTrainer(
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>"],
            show_progress=False,
        ),
    )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "bos_token": None})
    )
    return folder


def experiment_of(
    data: pathlib.Path,
    language_model: pathlib.Path,
    vision_encoder: pathlib.Path,
    config: FlamingoConfig,
    **changes: str,
) -> Experiment:
    experiment = small.flamingo(
        data,
        training=dataclasses.replace(small.TRAINING, steps=STEPS),
        flamingo=config,
        tokenizer=str(language_model),
    )
    return dataclasses.replace(
        experiment,
        data={"ltip": dataclasses.replace(experiment.data["ltip"], max_length=96)},
        language_model_from=str(language_model),
        vision_encoder_from=str(vision_encoder),
        **changes,
    )


@pytest.fixture(scope="module")
def config(data: pathlib.Path, folders: tuple[pathlib.Path, pathlib.Path]) -> FlamingoConfig:
    base = small.flamingo(data).flamingo
    assert base is not None
    language_model, vision = (
        read_config(folders[0], "language_model"),
        read_config(folders[1], "vision_encoder"),
    )
    return dataclasses.replace(base, language_model=language_model, vision=vision)


@pytest.fixture(scope="module")
def direct(
    data: pathlib.Path,
    folders: tuple[pathlib.Path, pathlib.Path],
    config: FlamingoConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Export:
    return run(experiment_of(data, *folders, config), tmp_path_factory.mktemp("direct"))


def convert(flag: str, folder: pathlib.Path, output: pathlib.Path) -> None:
    command = commands.load("convert")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "LANGUAGE_MODEL": "",
            "VISION_ENCODER": "",
            flag: str(folder),
            "OUTPUT": str(output),
            "VERIFY": False,
        }.items():
            patch.setattr(command, name, commands.flag(value))
        assert command.main() == 0


def train(experiment: Experiment, folder: pathlib.Path) -> None:
    command = commands.load("train")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "CONFIG": configuring.to_config(experiment),
            "WORKDIR": str(folder),
            "PREPARE": False,
        }.items():
            patch.setattr(command, name, commands.flag(value))
        assert command.main() == 0


def losses(folder: pathlib.Path) -> list[float]:
    return [
        line["loss"]
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    ]


def test_exports_train_and_resume_as_the_folders_do(
    data: pathlib.Path,
    folders: tuple[pathlib.Path, pathlib.Path],
    config: FlamingoConfig,
    direct: Export,
    tmp_path: pathlib.Path,
) -> None:
    exports = tmp_path / "qwen", tmp_path / "clip"
    for flag, folder, output in zip(
        ("LANGUAGE_MODEL", "VISION_ENCODER"), folders, exports, strict=True
    ):
        convert(flag, folder, output)
    assert [open_export(export).kind for export in exports] == [
        "language_model",
        "vision_encoder",
    ]
    assert open_export(exports[0]).dtypes["embedding"] == np.float16
    experiment = experiment_of(data, *exports, config)
    # Stopped after a step less, and gone on with.
    train(
        dataclasses.replace(
            experiment, training=dataclasses.replace(experiment.training, steps=STEPS - 1)
        ),
        tmp_path / "run",
    )
    again = run(experiment, tmp_path / "run")
    assert (
        losses(tmp_path / "run") == losses(direct.folder.parent)
        and len(losses(tmp_path / "run")) == STEPS
    )
    ours, theirs = again.read(), direct.read()
    assert sorted(ours) == sorted(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.scale
def test_killed_it_resumes_to_the_bit_exports_and_evaluates(
    data: pathlib.Path, folders: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """The documented recipe on a Llama form, by the commands alone; after the last kill nothing
    but the run's folder and the parts' is left of it.
    """
    language_model = language_model_folder(tmp_path / "llama", "llama")
    steps, chance = 12, random.Random(0)
    places = [f"--config.{part}.ltip.path={data / 'ltip'}" for part in ("data", "held_out")]
    schedule = [
        f"--config.training.{name}={value}"
        for name, value in {
            "steps": steps,
            "log_every": 1,
            "save_every": 2,
            "evaluate_every": 6,
        }.items()
    ]

    def start(name: str) -> "subprocess.Popen[str]":
        config = f"--config=configs/flamingo_open.py:tiny,{language_model},{folders[1]},ltip=pairs"
        return test_kills.launch(
            "train", config, f"--workdir={tmp_path / name}", *places, *schedule
        )

    test_kills.finish(start("unbroken"))
    for _ in range(3):
        before = test_kills.newest(tmp_path / "killed")
        process = start("killed")
        # Lines of steps behind the checkpoint are cut away at the start; until then they are
        # the last run's.
        while test_kills.last_step(tmp_path / "killed") > before and process.poll() is None:
            time.sleep(0.002)
        test_kills.wait_for(
            min(before + chance.randint(1, 3), steps - 2), tmp_path / "killed", process
        )
        assert process.poll() is None, test_kills.finish(process)
        os.kill(process.pid, signal.SIGKILL)
        test_kills.finish(process, -signal.SIGKILL)
        assert test_kills.last_step(tmp_path / "killed") < steps
    test_kills.finish(start("killed"))
    found = training_losses(tmp_path / "killed")
    assert (
        found == training_losses(tmp_path / "unbroken")
        and list(found) == list(range(1, steps + 1))
        and len(set(found.values())) == steps
    )

    exports = [tmp_path / name / "export" for name in ("killed", "unbroken")]
    for export in exports:
        test_kills.finish(
            test_kills.launch("export", f"--workdir={export.parent}", f"--output={export}")
        )
    ours, theirs = (open_export(export).read() for export in exports)
    assert ours.keys() == theirs.keys() and all(
        ours[name].tobytes() == theirs[name].tobytes() for name in ours
    )
    benchmarks = [
        f"--benchmark=captioning:ltip={data / 'ltip'}:validation",
        f"--benchmark=vqa:vqa={data / 'vqa'}:test",
    ]
    options = ["--shots=0", "--limit=3", "--text_examples=0", f"--output={tmp_path / 'report'}"]
    test_kills.finish(test_kills.launch("evaluate", f"--model={exports[0]}", *benchmarks, *options))
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (
        report["counts"] == {"ltip": {"0": 3}, "vqa": {"0": 3}}
        and report["model"]["digest"] == load_flamingo(exports[0]).digest
    )
    assert all(
        0 <= figure <= 1 for of in report["benchmarks"].values() for figure in of["0"].values()
    )


def training_losses(folder: pathlib.Path) -> dict[int, float]:
    """Of every step that was trained, once each."""
    lines = [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines), "a step is there twice"
    return found


def test_the_export_stands_alone(
    direct: Export, folders: tuple[pathlib.Path, pathlib.Path]
) -> None:
    """Frozen parts are the published ones to the bit, and the tokenizer is the published one."""
    for folder, part in zip(folders, ("language_model", "vision_encoder"), strict=True):
        found = open_folder(folder, part)  # type: ignore[arg-type]
        exported = direct.read(f"{part}/")
        assert len(exported) == len(found.shapes)
        for name, array in found.read(declare(found)).items():
            expected = np.asarray(array).astype(np.float32)
            np.testing.assert_array_equal(exported[f"{part}/{name}"], expected)
    loaded = load_flamingo(direct.folder)
    assert (
        isinstance(loaded.tokenizer, JSONTokenizer)
        and loaded.tokenizer.fingerprint == Tokenizer.load(folders[0]).fingerprint
    )
    assert (
        loaded.tokenizer.eoc == 320 > loaded.tokenizer.pieces
        and loaded.tokenizer.bos == loaded.tokenizer.eos
    )
    (made,) = Engine(loaded).generate([["a small"]], DecodingConfig(max_tokens=4))
    assert isinstance(made.text, str)


def test_what_does_not_belong_together_is_refused(
    data: pathlib.Path, folders: tuple[pathlib.Path, pathlib.Path], config: FlamingoConfig
) -> None:
    def refused(experiment: Experiment) -> str:
        with pytest.raises(UserError) as caught:
            open_frozen_sources(experiment)
        return str(caught.value)

    narrow = dataclasses.replace(
        config,
        language_model=dataclasses.replace(
            config.language_model, positions=PositionsConfig(kind="rotary", base=3.0)
        ),
    )
    assert (
        "was trained with positions.base = 1000000.0, but this config's language_model has 3.0"
        in refused(experiment_of(data, *folders, narrow))
    )
    assert "model_type = 'clip_vision_model'" in refused(
        experiment_of(data, folders[1], folders[1], config)
    )
