"""Results are read as they were written, and malformed ones are told in a sentence."""

import json
import math
import pathlib
from typing import Any

import pytest

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.results.result_file import read_result, read_results
from tests.evaluation.results.made_runs import vqa_predictions, write_cell


def test_a_result_is_read_as_it_was_written(tmp_path: pathlib.Path) -> None:
    missing = {"policy": "skip", "queries": 2, "support": 1}
    written = write_cell(tmp_path, vqa_predictions(8, 0.5), seed=3, missing_media=missing)
    file = tmp_path / "results/okvqa.4_shots.random.seed3.json"
    content = json.loads(file.read_text())
    assert content["format"] == 1 and content["metrics"]["accuracy"]["score"] == 0.375
    read = read_result(file)
    assert read == written and read.name == "okvqa.4_shots.random.seed3" and read.missing == 3
    assert read.estimate.low < read.estimate.score == 0.375 < read.estimate.high
    reach = 50 * (read.estimate.high - read.estimate.low)
    assert str(read) == f"okvqa.4_shots.random.seed3: accuracy 37.5 ± {reach:.1f}"


def test_an_error_that_could_not_be_computed_is_null(tmp_path: pathlib.Path) -> None:
    write_cell(tmp_path, vqa_predictions(1, 1.0))
    (read,) = read_results(tmp_path)
    assert read.metrics["accuracy"]["interval_95"] is None
    assert read.estimate.score == 1.0 and math.isnan(read.estimate.low)
    assert str(read) == "okvqa.4_shots.random: accuracy 100.0"


def test_results_are_in_the_order_of_a_table(tmp_path: pathlib.Path) -> None:
    for shots, control in ((32, False), (4, True), (4, False), (0, False)):
        write_cell(tmp_path, vqa_predictions(4, 0.5), shots=shots, control=control)
    write_cell(tmp_path, vqa_predictions(4, 0.5), shots=4, benchmark="coco")
    assert [cell.name for cell in read_results(tmp_path)] == [
        "coco.4_shots.random",
        "okvqa.0_shots",
        "okvqa.4_shots.random",
        "okvqa.4_shots.random.control",
        "okvqa.32_shots.random",
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": 2}, "has the format 2, not 1"),
        ({"shots": "4"}, "has 'shots' of another type"),
        ({"shots": True}, "has 'shots' of another type"),
        ({"references": []}, "has 'references' of another type"),
        ({"seconds": "long"}, "has 'seconds' of another type"),
        ({"headline": "CIDEr-D"}, "has no metric 'CIDEr-D'"),
        ({"metrics": {"accuracy": 0.5}}, "has a malformed metric"),
        ({"metrics": {"accuracy": {"score": 0.5, "interval_95": 3}}}, "has a malformed metric"),
        ({"n": None}, "has no 'n'"),
    ],
)
def test_a_malformed_result_is_told_in_a_sentence(
    tmp_path: pathlib.Path, change: dict[str, Any], sentence: str
) -> None:
    write_cell(tmp_path, vqa_predictions(4, 0.5))
    (file,) = (tmp_path / "results").iterdir()
    content = json.loads(file.read_text()) | change
    file.write_text(
        json.dumps({name: value for name, value in content.items() if value is not None})
    )
    with pytest.raises(UserError) as error:
        read_results(tmp_path)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_results_is_told(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="has no results/"):
        read_results(tmp_path)
