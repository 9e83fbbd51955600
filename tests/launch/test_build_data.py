"""launch.build_data's command line: which flags a source reads, official splits,
contradictions.
"""

import contextlib
import io
import json
import pathlib
import re
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from absl import flags
from rich.console import Console

from data_pipelines.build.sentencepiece_trainer import texts_in, train_tokenizer
from data_pipelines.build.source import SplitFractions
from data_pipelines.build.sources import OPTIONS, SOURCES, Built, Values, build, make_source
from data_pipelines.build.statistics_table import statistics_table
from data_pipelines.build.tfds import Tfds
from flamingo_jax.errors import UserError
from launch import command
from tests.data_pipelines.raw import colourful, lines, save
from tests.data_pipelines.test_public_sources import prepare
from tests.launch import commands

build_data = commands.load("build_data")


def run(name: str, output: pathlib.Path, **given: object) -> Built:
    """Builds in the tests' own process."""
    return build(name, output, given, contextlib.nullcontext)


def refused(sentence: str, name: str, **given: object) -> None:
    with pytest.raises(UserError, match=sentence):
        run(name, pathlib.Path("out"), **given)


def test_an_option_that_the_source_does_not_read_is_refused() -> None:
    refused("--fps is not read by coco but by video_folder, questions_folder", "coco", fps=2.0)
    refused("--captions is not read by webdataset", "webdataset", captions="x.jsonl", input=["x"])
    refused("--input is not read by quickstart", "quickstart", input=["x"])
    refused("--input is not set: name what coco shall read", "coco")
    with pytest.raises(UserError, match="--validation_share is not read by sentencepiece"):
        build_data.build_tokenizer(pathlib.Path("out"), {"validation_share": 0.5})


def test_every_option_is_read_by_some_source() -> None:
    assert {name for entry in SOURCES.values() for name in entry.options} == OPTIONS.keys()


@pytest.mark.parametrize("name", [name for name, entry in SOURCES.items() if entry.make])
def test_stated_defaults_are_those_of_the_sources(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made with every default given is what is made with none."""
    monkeypatch.setattr(Tfds, "shares", None)
    monkeypatch.setattr(Tfds, "kind", "videos")
    stated = {
        option: OPTIONS[option].default
        for option in SOURCES[name].options
        if OPTIONS[option].default is not None and option not in (*SPLITTING, "workers")
    }
    assert make_source(name, {"input": ["x"]}) == make_source(name, {"input": ["x"]} | stated)


SPLITTING = ("validation_share", "test_share", "split")


def command_line(*arguments: str) -> tuple[int, str]:
    """A command's exit code and what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.build_data", *arguments],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_help_of_a_source_shows_its_flags_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    code, printed = command_line("coco", "--help")
    shown = set(re.findall(r"^  --(\w+)$", printed, re.MULTILINE))
    assert code == 0 and shown == {"output", *SOURCES["coco"].options}
    assert f"build_data coco {SOURCES['coco'].example}" in printed


def prepared(*arguments: str) -> list[str]:
    """A command line without its source, whose flags are defined and forgotten."""
    argv = ["build_data", *arguments]
    try:
        build_data.prepare(argv)
    finally:
        for name in OPTIONS.keys() & set(flags.FLAGS):
            delattr(flags.FLAGS, name)
    return argv


def test_the_source_is_the_first_word_or_a_flag() -> None:
    assert prepared("coco", "--workers=1") == ["build_data", "--workers=1", "--source=coco"]
    assert prepared("--workers=1", "--source=coco")[1:] == ["--workers=1", "--source=coco"]
    for arguments, sentence in (
        (("--fps=2",), "no source is named: begin with one of quickstart, image_folder"),
        (("coca",), "there is no source 'coca', did you mean coco"),
        (("coco", "--source=mmc4"), "both coco and --source=mmc4 are named"),
        (("coco", "--fps=2"), "--fps is not read by coco but by video_folder"),
        (("coco", "--noalt_text"), "--alt_text is not read by coco but by html_pages"),
    ):
        with pytest.raises(UserError, match=sentence):
            prepared(*arguments)


def test_what_the_command_line_sets_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    values = flags.FlagValues()
    flags.DEFINE_float("fps", 1.0, "", flag_values=values)
    flags.DEFINE_integer("workers", 0, "", flag_values=values)
    values(["program", "--fps=1.0"])
    monkeypatch.setattr(command.flags, "FLAGS", values)
    assert command.given_flags() == {"fps"}


def test_a_flag_of_another_verb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = commands.load("benchmark")
    for verb, given, datasets, sentence in (
        (
            "train",
            "batches",
            [],
            "--batches is not read by train but by data --dataset, data --config",
        ),
        ("data", "steps", ["x"], "--steps is not read by data --dataset but by train"),
        (
            "data",
            "image_size",
            [],
            "--image_size is not read by data --config but by data --dataset",
        ),
    ):
        monkeypatch.setattr(command, "given_flags", lambda given=given: {given, "json"})
        monkeypatch.setattr(module, "DATASETS", commands.flag(datasets))
        with pytest.raises(UserError, match=sentence):
            module.main(verb)


@pytest.mark.parametrize(
    ("given", "shares"),
    [
        ({}, SplitFractions(0.1, 0.0)),
        ({"test_share": 0.2}, SplitFractions(0.1, 0.2)),
        ({"test_share": 1.0}, SplitFractions(0.0, 1.0)),
        ({"validation_share": 0.3, "test_share": 0.7}, SplitFractions(0.3, 0.7)),
        ({"split": "train"}, SplitFractions(0.0, 0.0)),
        ({"split": "validation"}, SplitFractions(1.0, 0.0)),
        ({"split": "test"}, SplitFractions(0.0, 1.0)),
    ],
)
def test_shares(given: dict[str, object], shares: SplitFractions) -> None:
    assert Values(given).shares() == shares


def test_shares_that_contradict_each_other() -> None:
    for given, sentence in (
        ({"validation_share": 0.6, "test_share": 0.6}, "are more than all records"),
        (
            {"split": "test", "test_share": 0.5},
            "--split=test takes all records: leave out --test_share",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            Values(given).shares()


@pytest.mark.parametrize("given", [{"split": "test"}, {"test_share": 1.0}])
def test_an_official_test_split_is_one(tmp_path: pathlib.Path, given: dict[str, object]) -> None:
    root = tmp_path / "val2014"
    for number in range(12):
        save(root / f"{number}.png", colourful(8, 8, seed=number))
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(12)]
    told = [{"image_id": number, "caption": str(number)} for number in range(12)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": told}))
    inputs = {"input": [str(tmp_path / "captions.json")], "images": [str(root)]}
    run("coco", tmp_path / "coco", **inputs, **given)
    statistics = json.loads((tmp_path / "coco" / "1.0.0" / "statistics.json").read_text())
    assert statistics["splits"] == {"test": 12}


def test_a_tokenizer_of_another_size_is_not_taken_for_the_one_that_is_asked_for(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n")
    train_tokenizer(texts_in(tmp_path), tmp_path / "out", vocab_size=280)
    given: dict[str, object] = {"input": [str(tmp_path)]}
    assert build_data.build_tokenizer(tmp_path / "out", given | {"vocab_size": 280}) == 0
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(UserError, match="with 280 pieces in place of --vocab_size=300"):
        build_data.build_tokenizer(tmp_path / "out", given | {"vocab_size": 300})


def test_lost_captions_are_in_the_table(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "raw" / "a.png", colourful())
    lines(tmp_path / "raw" / "captions.jsonl", {"image": "a.png", "captions": ["x", None]})
    made = run(
        "image_folder", tmp_path / "out", input=[str(tmp_path / "raw")], validation_share=0.0
    )
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(statistics_table(made))
    assert "1 empty text" in console.export_text()


def test_options_that_the_input_leaves_without_use_are_refused(tmp_path: pathlib.Path) -> None:
    image, text = tfds.features.Image(shape=(None, None, 3)), tfds.features.Text()
    png = save(tmp_path / "a.png", colourful())
    told = [{"image": io.BytesIO(png), "caption": "x"}]
    features = {"image": image, "caption": text}
    several = prepare(tmp_path / "several", features, {"train": told, "test": told})
    one = prepare(tmp_path / "one", features, {"test": told})
    for folder, given, sentence in (
        (several, {"validation_share": 0.5}, "which --validation_share does not change"),
        (several, {"split": "train"}, "has splits of its own, which --split does not change"),
        (one, {"fps": 2.0}, "--fps is for videos, and --input makes pairs"),
    ):
        with pytest.raises(UserError, match=sentence):
            make_source("tfds", {"input": [folder], "kind": "pairs"} | given)
    make_source("tfds", {"input": [one], "validation_share": 0.5})
    make_source("tfds", {"input": [several], "kind": "pairs"})


def test_an_official_split_that_is_dealt_out_is_told(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    image, text = tfds.features.Image(shape=(None, None, 3)), tfds.features.Text()
    told = [{"image": io.BytesIO(save(tmp_path / "a.png", colourful())), "caption": "x"}]
    for split, shares, warned in (
        ("test", SplitFractions(), True),
        ("test", SplitFractions.whole("test"), False),
        ("train", SplitFractions(), False),
    ):
        caplog.clear()
        folder = tmp_path / f"{split}{warned}"
        name = prepare(folder, {"image": image, "caption": text}, {split: told})
        assert len(Tfds(name, shares).entries()) == 1
        assert ("--split=test keeps it whole" in caplog.text) == warned
