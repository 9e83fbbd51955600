"""Runs side by side: the paired comparison of their stored predictions."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from scipy import stats

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.protocol.benchmark import Prediction
from flamingo_jax.evaluation.results.comparison import CellKey, compare_cells, read_runs, warnings
from flamingo_jax.evaluation.results.comparison_report import compare_runs
from flamingo_jax.evaluation.scoring.report import ScoreReport
from flamingo_jax.evaluation.statistics import Estimate
from tests.evaluation.results.made_runs import vqa_predictions, write_cell, write_suite

KEY = CellKey("okvqa", "random", 4, 0, False)


def two(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    return [tmp_path / "small", tmp_path / "large"]


def test_a_difference_is_that_of_the_paired_t_test(tmp_path: pathlib.Path) -> None:
    made = []
    for folder, share in zip(two(tmp_path), (0.3, 0.7), strict=True):
        predictions = [
            dataclasses.replace(one, cluster="") for one in vqa_predictions(60, share, seed=5)
        ]
        made.append(np.array([one.text == "red" for one in predictions], float))
        # The order of the lines is not that of the other run.
        write_cell(folder, predictions[:: -1 if share > 0.5 else 1])
    runs = read_runs(two(tmp_path))
    found = compare_cells(*runs, KEY)
    expected = stats.ttest_rel(made[1], made[0])
    assert found.difference is not None and found.items == 60 and not found.why
    assert found.difference.difference == pytest.approx(np.mean(made[1] - made[0]))
    assert found.difference.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert (found.difference.low, found.difference.high) == pytest.approx(tuple(interval))


def test_only_queries_of_both_runs_are_compared(tmp_path: pathlib.Path) -> None:
    write_cell(two(tmp_path)[0], vqa_predictions(10, 1.0))
    write_cell(two(tmp_path)[1], vqa_predictions(14, 1.0)[2:])
    runs = read_runs(two(tmp_path))
    found = compare_cells(*runs, KEY)
    assert found.items == 8 and found.why == "6 items of one run alone are left out"
    assert found.difference is not None and found.difference.p == 1.0
    (told,) = warnings(*runs)
    assert "okvqa: small and large differ in the number of queries (10 and 12)" in told


def _as_curve(predictions: list[Prediction], **options: object) -> ScoreReport:
    """Scores by the area under the ROC curve, items as launch.score auc has them."""
    labels = np.array([one.answers[0] == "yes" for one in predictions])
    scores = np.array([float(one.text) for one in predictions])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    items = [
        {"id": one.id, "label": int(label), "score": float(score)}
        for one, label, score in zip(predictions, labels, scores, strict=True)
    ]
    area = Estimate(float(np.mean(pairs)), 0.1, 0.4, 0.6)
    return ScoreReport({"ROC AUC": area}, items, {})


def _as_types(predictions: list[Prediction], **options: object) -> ScoreReport:
    """Scores by the mean over types of questions, as STAR is."""
    right = {one.id: float(one.text == one.answers[0]) for one in predictions}
    types = sorted({one.question_type for one in predictions})
    means = [
        np.mean([right[one.id] for one in predictions if one.question_type == name])
        for name in types
    ]
    items = [{"id": name, "accuracy": score} for name, score in right.items()]
    return ScoreReport({"mean": Estimate(float(np.mean(means)), 0.1, 0.1, 0.9)}, items, {})


def test_scores_that_are_no_means_are_resampled(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flamingo_jax.evaluation.scoring.predictions import SCORERS

    monkeypatch.setitem(SCORERS, "curve", _as_curve)
    monkeypatch.setitem(SCORERS, "types", _as_types)
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    for folder, noise in zip(two(tmp_path), (2.0, 0.3), strict=True):
        values = 1 / (1 + np.exp(-(labels + noise * rng.normal(size=80))))
        asked = [
            Prediction(f"h{n}", "", str(value), ("yes" if label else "no",))
            for n, (label, value) in enumerate(zip(labels, values, strict=True))
        ]
        write_cell(folder, asked, benchmark="memes", scorer="curve")
        # Types of different sizes, so that their mean is not that of the items.
        typed = [
            dataclasses.replace(one, question_type="rare" if n < 6 else "frequent")
            for n, one in enumerate(vqa_predictions(80, 0.9 - 0.25 * noise))
        ]
        write_cell(folder, typed, benchmark="star", scorer="types")
    runs = read_runs(two(tmp_path))
    for benchmark in ("memes", "star"):
        key = KEY._replace(benchmark=benchmark)
        found = compare_cells(*runs, key).difference
        scores = [run.cells[key].estimate.score for run in runs]
        assert found is not None and found.low > 0 and found.p < 0.05
        assert found.difference == pytest.approx(scores[1] - scores[0])


def test_kinetics_is_paired_by_the_mean_of_top_1_and_top_5(tmp_path: pathlib.Path) -> None:
    """Its items have the parts of the mean alone."""
    rng = np.random.default_rng(1)
    made = []
    for folder, most in zip(two(tmp_path), (12, 4), strict=True):
        ranks = rng.integers(0, most, 60)
        made.append(((ranks < 1) + 1.0 * (ranks < 5)) / 2)
        asked = [Prediction(f"k{n}", "", "", ("a",), rank=int(r)) for n, r in enumerate(ranks)]
        write_cell(
            folder,
            asked,
            benchmark="kinetics700",
            scorer="top_k",
            headline="mean of top-1 and top-5",
        )
    found = compare_cells(*read_runs(two(tmp_path)), KEY._replace(benchmark="kinetics700"))
    assert found.difference is not None
    assert found.difference.difference == pytest.approx(np.mean(made[1] - made[0]))
    assert found.difference.p == pytest.approx(stats.ttest_rel(made[1], made[0]).pvalue)


def test_a_score_that_nothing_reproduces_has_no_test(tmp_path: pathlib.Path) -> None:
    for folder in two(tmp_path):
        cell = write_cell(folder, vqa_predictions(10, 0.5))
        metrics = {"accuracy": {**cell.metrics["accuracy"], "score": 0.123}}
        write_cell(folder, vqa_predictions(10, 0.5), metrics=metrics)
    found = compare_cells(*read_runs(two(tmp_path)), KEY)
    assert found.difference is None and found.why == "accuracy has no paired test"


def test_what_differs_besides_the_model_is_told(tmp_path: pathlib.Path) -> None:
    small, large = two(tmp_path)
    write_suite(small)
    write_suite(
        large,
        0.1,
        protocol={"decoding": {"beam_size": 1}},
        model={"folder": "exports/other", "digest": "d2" * 16},
        references={"okvqa.json": "77" * 32},
    )
    told = warnings(*read_runs([small, large]))
    assert told[0] == (
        "coco, okvqa: small and large differ in decoding.beam_size (3 and 1), so that the"
        " difference of their scores is not the model's alone."
    )
    assert any(
        "okvqa: " in one and "okvqa.json (5e5e5e5e5e5e and 777777777777)" in one for one in told
    )
    assert not warnings(*read_runs([small, small]))


def test_random_shots_are_compared_with_those_of_rices(tmp_path: pathlib.Path) -> None:
    for folder, selection in zip(two(tmp_path), ("random", "rices"), strict=True):
        for shots in (0, 4):
            share = 0.4 + 0.1 * shots * (selection == "rices")
            about = {"selection": selection} if shots else {}
            write_cell(
                folder,
                vqa_predictions(30, share),
                selection=selection,
                shots=shots,
                protocol=about,
            )
    found = compare_runs(read_runs(two(tmp_path)))
    assert [row[0] for row in found.rows] == [
        "OK-VQA\naccuracy",
        "OK-VQA\naccuracy, random and rices",
    ]
    assert found.rows[1][4].startswith("+") and not found.only
    (told,) = found.warnings
    assert told == (
        'okvqa: small and large differ in selection ("random" and "rices"), and their model is'
        " the same."
    )
    # With both in one run, each is compared with its own kind.
    write_cell(two(tmp_path)[0], vqa_predictions(30, 0.4), selection="rices")
    found = compare_runs(read_runs(two(tmp_path)))
    assert [row[0] for row in found.rows] == ["OK-VQA\naccuracy", "OK-VQA\naccuracy, rices"]
    assert found.only == ["Only in small: okvqa.4_shots.random."]


def test_runs_are_laid_side_by_side(tmp_path: pathlib.Path) -> None:
    small, large = two(tmp_path)
    write_suite(small)
    write_suite(large, 0.3)
    write_cell(large, vqa_predictions(8, 0.5), shots=32)
    found = compare_runs(read_runs([small, large]))
    assert found.header == ["benchmark", "shots", "small", "large", "large − small", "p"]
    assert len(found.rows) == 14 and not found.warnings
    assert found.only == ["Only in large: okvqa.32_shots.random."]
    row = next(row for row in found.rows if row[0] == "OK-VQA\naccuracy, random, seed 0")
    first, second = (float(text.split(" ±")[0]) for text in row[2:4])
    difference = float(row[4].split(" [")[0])
    assert difference == pytest.approx(second - first, abs=0.11) and row[4].endswith("\n40 items")
    text = found.markdown()
    assert (
        text.startswith("# Runs side by side")
        and "| OK-VQA<br>accuracy, random, seed 0 | 4 |" in text
    )
    assert "<td>OK-VQA<small>accuracy, random, seed 0</small></td>" in found.page()


def test_unreadable_predictions_are_told(tmp_path: pathlib.Path) -> None:
    small, large = two(tmp_path)
    for folder in (small, large):
        cell = write_cell(folder, vqa_predictions(4, 0.5))
    file = large / cell.predictions
    header, *lines = file.read_text().splitlines()
    for content, sentence in (
        ([header, json.dumps({"id": "q0"})], "line 2, is no prediction"),
        ([header], "has no predictions yet"),
        (["[1]"], "is no file of predictions"),
        ([header.replace('"vqa"', '"made_up"'), *lines], "names the scorer 'made_up'"),
    ):
        file.write_text("\n".join(content) + "\n")
        with pytest.raises(UserError, match=sentence):
            compare_cells(*read_runs([small, large]), KEY)
    file.unlink()
    with pytest.raises(UserError, match="holds no predictions"):
        compare_runs(read_runs([small, large]))
