"""launch.build_data's command line: which flags a source reads, official splits,
contradictions.
"""

import contextlib
import io
import json
import pathlib
import types
from collections.abc import Callable

import pytest
import tensorflow_datasets as tfds
from absl import flags

from data_pipelines.build.sentencepiece_trainer import texts_in, train_tokenizer
from data_pipelines.build.source import Shares
from data_pipelines.build.tfds import Tfds
from flamingo_jax.errors import UserError
from launch import command
from tests.data_pipelines.raw import colourful, lines, save
from tests.data_pipelines.test_public_sources import prepare
from tests.launch import commands

Build = Callable[..., types.ModuleType]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    """(source, flag=value, ...) -> the module, whose flags are set so."""
    module = commands.load("build_data")
    monkeypatch.setattr(module, "workers", contextlib.nullcontext)
    given_now: set[str] = set()
    monkeypatch.setattr(module.command, "given_flags", lambda: given_now)

    def run(**given: object) -> types.ModuleType:
        for name, value in given.items():
            monkeypatch.setattr(module, NAMES.get(name, name.upper()), commands.flag(value))
        given_now.clear()
        given_now.update(given)
        return module

    return run


NAMES = {"field": "FIELDS", "piece": "PIECES"}


def refused(build: Build, sentence: str, **given: object) -> None:
    with pytest.raises(UserError, match=sentence):
        build(output="out", **given).main()


def test_a_flag_that_the_source_does_not_read_is_refused(build: Build) -> None:
    refused(
        build,
        "--fps is not read by --source=coco but by --source=video_folder, --source=questions",
        source="coco",
        fps=2.0,
    )
    refused(
        build,
        "--captions is not read by --source=webdataset",
        source="webdataset",
        captions="x.jsonl",
        input=["x"],
    )
    refused(
        build,
        "--validation_share is not read by --source=sentencepiece",
        source="sentencepiece",
        validation_share=0.5,
    )
    refused(build, "--input is not read by --source=quickstart", source="quickstart", input=["x"])


def test_every_flag_is_read_by_some_source_and_every_source_has_its_flags(build: Build) -> None:
    module = build()
    read = {name for names in module.READS.values() for name in names}
    named = {
        flag for flag in dir(module) if isinstance(getattr(module, flag), types.SimpleNamespace)
    }
    backwards = {constant: name for name, constant in NAMES.items()}
    assert {backwards.get(name, name.lower()) for name in named} - {"source", "output"} == read


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
        ({}, Shares(0.1, 0.0)),
        ({"test_share": 0.2}, Shares(0.1, 0.2)),
        ({"test_share": 1.0}, Shares(0.0, 1.0)),
        ({"validation_share": 0.3, "test_share": 0.7}, Shares(0.3, 0.7)),
        ({"split": "train"}, Shares(0.0, 0.0)),
        ({"split": "validation"}, Shares(1.0, 0.0)),
        ({"split": "test"}, Shares(0.0, 1.0)),
    ],
)
def test_shares(build: Build, given: dict[str, object], shares: Shares) -> None:
    assert build(**given).shares(set(given)) == shares


def test_shares_that_contradict_each_other(build: Build) -> None:
    for given, sentence in (
        ({"validation_share": 0.6, "test_share": 0.6}, "are more than all records"),
        (
            {"split": "test", "test_share": 0.5},
            "--split=test takes all records: leave out --test_share",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            build(**given).shares(set(given))


@pytest.mark.parametrize("given", [{"split": "test"}, {"test_share": 1.0}])
def test_an_official_test_split_is_one(
    build: Build, tmp_path: pathlib.Path, given: dict[str, object]
) -> None:
    root = tmp_path / "val2014"
    for number in range(12):
        save(root / f"{number}.png", colourful(8, 8, seed=number))
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(12)]
    told = [{"image_id": number, "caption": str(number)} for number in range(12)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": told}))
    inputs = {"input": [str(tmp_path / "captions.json")], "images": [str(root)]}
    assert build(source="coco", output=str(tmp_path / "coco"), **inputs, **given).main() == 0
    statistics = json.loads((tmp_path / "coco" / "1.0.0" / "statistics.json").read_text())
    assert statistics["splits"] == {"test": 12}


def test_a_tokenizer_of_another_size_is_not_taken_for_the_one_that_is_asked_for(
    build: Build, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n")
    train_tokenizer(texts_in(tmp_path), tmp_path / "out", vocab_size=280)
    given = {
        "source": "sentencepiece",
        "input": [str(tmp_path)],
        "output": str(tmp_path / "out"),
    }
    assert build(**given, vocab_size=280).main() == 0
    with pytest.raises(UserError, match="with 280 pieces in place of --vocab_size=300"):
        build(**given, vocab_size=300).main()


def test_lost_captions_are_in_the_table(
    build: Build, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "raw" / "a.png", colourful())
    lines(tmp_path / "raw" / "captions.jsonl", {"image": "a.png", "captions": ["x", None]})
    given = {
        "input": [str(tmp_path / "raw")],
        "output": str(tmp_path / "out"),
        "validation_share": 0.0,
    }
    assert build(source="image_folder", **given).main() == 0
    assert "1 empty text" in capsys.readouterr().out


def test_flags_that_the_input_leaves_without_use_are_refused(
    build: Build, tmp_path: pathlib.Path
) -> None:
    image, text = tfds.features.Image(shape=(None, None, 3)), tfds.features.Text()
    png = save(tmp_path / "a.png", colourful())
    told = [{"image": io.BytesIO(png), "caption": "x"}]
    features = {"image": image, "caption": text}
    several = Tfds(prepare(tmp_path / "several", features, {"train": told, "test": told}))
    one = Tfds(prepare(tmp_path / "one", features, {"test": told}))
    module = build()
    for source, given, sentence in (
        (
            several,
            "validation_share",
            "has splits of its own, which --validation_share does not change",
        ),
        (several, "split", "has splits of its own, which --split does not change"),
        (one, "fps", "--fps is for videos, and --input makes pairs"),
    ):
        with pytest.raises(UserError, match=sentence):
            module.check_used(source, {given, "kind"})
    module.check_used(one, {"split", "validation_share"})
    module.check_used(several, {"kind"})


def test_an_official_split_that_is_dealt_out_is_told(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    image, text = tfds.features.Image(shape=(None, None, 3)), tfds.features.Text()
    told = [{"image": io.BytesIO(save(tmp_path / "a.png", colourful())), "caption": "x"}]
    for split, shares, warned in (
        ("test", Shares(), True),
        ("test", Shares.whole("test"), False),
        ("train", Shares(), False),
    ):
        caplog.clear()
        folder = tmp_path / f"{split}{warned}"
        name = prepare(folder, {"image": image, "caption": text}, {split: told})
        assert len(Tfds(name, shares).entries()) == 1
        assert ("--split=test keeps it whole" in caplog.text) == warned
