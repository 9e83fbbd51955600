"""The commands that read stored runs: launch.compare and launch.score rescore."""

import json
import pathlib

import pytest

from flamingo_jax.errors import UserError
from launch import command
from tests.evaluation.results.made_runs import caption_predictions, vqa_predictions, write_cell
from tests.launch.commands import flag, load


def test_compare_prints_and_writes(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, share in (("small", 0.2), ("large", 0.9)):
        write_cell(tmp_path / name, vqa_predictions(40, share))
    compare = load("compare")
    monkeypatch.setattr(compare, "OUTPUT", flag(str(tmp_path / "out")))
    assert compare.compare([str(tmp_path / "small"), str(tmp_path / "large")]) == 0
    printed = capsys.readouterr().out
    assert "large − small" in printed and "< 0.001" in printed
    assert (tmp_path / "out/comparison.md").read_text() in printed
    assert "<table>" in (tmp_path / "out/comparison.html").read_text()


def test_compare_takes_the_words_that_are_no_flags() -> None:
    compare = load("compare")
    argv = ["launch.compare", "a", "--output", "folder", "b", "--wordnet=x", "c"]
    assert isinstance(compare.take_runs(argv), command.Help)
    assert argv == ["launch.compare", "--output", "folder", "--wordnet=x"]
    assert compare._RUNS == ["a", "b", "c"]


def test_compare_tells_what_is_missing(tmp_path: pathlib.Path) -> None:
    compare = load("compare")
    with pytest.raises(UserError, match="name two runs or more"):
        compare.compare(["a"])
    write_cell(tmp_path / "a", vqa_predictions(4, 0.5))
    write_cell(tmp_path / "b", vqa_predictions(4, 0.5), shots=8)
    with pytest.raises(UserError, match="has no benchmark at a number of shots"):
        compare.compare([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(UserError, match="has no results/"):
        compare.compare([str(tmp_path / "a"), str(tmp_path)])


def test_rescore_gives_the_scores_of_the_run(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = write_cell(tmp_path, caption_predictions(9, 0.5), benchmark="coco", scorer="captions")
    score = load("score")
    monkeypatch.setattr(score.command, "given_flags", lambda: {"predictions"})
    monkeypatch.setattr(score, "PREDICTIONS", flag(str(tmp_path / cell.predictions)))
    monkeypatch.setattr(score, "PER_ITEM", flag(str(tmp_path / "items.json")))
    assert score.main("rescore") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["task"] == "rescore" and printed["items"] == 9
    assert printed["metrics"] == cell.metrics and printed["scorer"] == "captions"
    items = json.loads((tmp_path / "items.json").read_text())
    assert [item["id"] for item in items] == [f"c{n}" for n in range(9)]
    mean = sum(item["CIDEr-D"] for item in items) / 9
    assert mean == pytest.approx(printed["metrics"]["CIDEr-D"]["score"])


def test_rescore_names_its_file_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    score = load("score")
    monkeypatch.setattr(score.command, "given_flags", lambda: {"references"})
    with pytest.raises(UserError, match="--references is not read by rescore"):
        score.main("rescore")
    monkeypatch.setattr(score.command, "given_flags", lambda: set())
    with pytest.raises(UserError, match="--predictions is not set"):
        score.main("rescore")
    monkeypatch.setattr(score, "PREDICTIONS", flag("nowhere.jsonl"))
    with pytest.raises(UserError, match="nowhere.jsonl holds no predictions"):
        score.main("rescore")
