"""The report of a suite, made of its files."""

import dataclasses
import pathlib
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from flamingo_jax.evaluation.protocol.benchmark import Prediction
from flamingo_jax.evaluation.results.markup import markdown_table
from flamingo_jax.evaluation.results.result_file import read_results
from flamingo_jax.evaluation.results.samples import choose_samples
from flamingo_jax.evaluation.results.score_table import rows_of, summarise_seeds
from flamingo_jax.evaluation.results.shot_chart import shot_chart
from flamingo_jax.evaluation.results.suite_report import score_cells, write_suite_report
from tests.evaluation.results.made_runs import vqa_predictions, write_cell, write_suite
from tests.evaluation.test_synthetic_world_page import Counter
from tests.evaluation.world import visual


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("suite")
    write_suite(folder)
    write_cell(folder, vqa_predictions(40, 0.9), selection="rices", shots=8)
    return folder


def test_the_table_has_scores_controls_and_seeds(suite: pathlib.Path) -> None:
    rows = rows_of(read_results(suite))
    header, cells = score_cells(rows)
    assert header == ["shots", "0", "4", "8", "queries", "missing"]
    assert [row[0].split("\n") for row in cells] == [
        ["COCO captions", "CIDEr-D, test"],
        ["OK-VQA", "accuracy, test, random"],
        ["OK-VQA", "accuracy, test, rices"],
    ]
    # Two seeds: the mean and the sample deviation of their shares of right answers.
    shares = [
        np.mean([one.text == "red" for one in vqa_predictions(40, 0.5, seed)]) for seed in (0, 1)
    ]
    mean, deviation = 100 * np.mean(shares), 100 * np.std(shares, ddof=1)
    run, control = cells[1][2].split("\n")
    assert run == f"{mean:.1f} ± {deviation:.1f} (2 seeds)"
    assert control.startswith("shots without images ") and control.endswith("(2 seeds)")
    # Zero-shot runs are in both rows; one seed has half of its interval.
    zero = rows[1].runs[0][0].estimate
    assert (
        cells[1][1] == cells[2][1] == f"{100 * zero.score:.1f} ± {50 * (zero.high - zero.low):.1f}"
    )
    assert cells[2][2] == "–" and cells[2][4:] == ["40", "0"]


def test_the_page_is_one_whole_file(suite: pathlib.Path) -> None:
    results = read_results(suite)
    visuals = {"okvqa": lambda id: None if id == "q1" else visual(7)}
    write_suite_report(suite, results, visuals=visuals)
    text = (suite / "report.html").read_text()
    found = Counter()
    found.feed(text)
    assert not found.opened and found.counts["svg"] == 2
    charts = sorted((suite / "charts").iterdir())
    assert [chart.name for chart in charts] == ["coco.svg", "okvqa.svg"]
    for chart in charts:
        assert xml.etree.ElementTree.parse(chart).getroot().tag.endswith("}svg")
        assert chart.read_text().partition("viewBox")[2] in text
    assert found.sources and all(one.startswith("data:image/jpeg;base64,") for one in found.sources)
    assert "Flamingo-80B" in text and "without images" in text and "d1d1d1d1" in text
    # Only a query's own part of a prompt is shown, and failures come first.
    assert "what colour is it" in text and "how many" not in text
    shown = text[text.index("What it answers") :]
    marks = re.findall(r'class="sample( right)?"', shown[shown.index("OK-VQA") :])
    assert marks[0] == "" and " right" in marks


def test_the_report_in_markdown_has_the_same_table(suite: pathlib.Path) -> None:
    write_suite_report(suite, read_results(suite))
    text = (suite / "report.md").read_text()
    assert "| shots | 0 | 4 | 8 | queries | missing |" in text
    assert "| OK-VQA<br>accuracy, test, rices |" in text
    assert "| Flamingo-3B | 41.2 | 43.3 | 44.6 | 45.6 | 45.9 |" in text
    assert "arXiv 2204.14198" in text and "| decoding.beam_size | 3 | all |" in text
    assert "of colour" in text


def test_a_report_needs_no_predictions(tmp_path: pathlib.Path) -> None:
    cell = write_cell(tmp_path, vqa_predictions(1, 1.0), shots=0, benchmark="own_set", title="<b>")
    (tmp_path / cell.predictions).unlink()
    write_suite_report(tmp_path, [cell])
    text = (tmp_path / "report.html").read_text()
    assert "What it answers" not in text and "&lt;b&gt;" in text and "<b>accuracy" not in text


def test_answers_without_ground_truths_are_reported_unscored(tmp_path: pathlib.Path) -> None:
    asked = [Prediction(f"q{n}", "", "red", ()) for n in range(3)]
    write_cell(tmp_path, asked, benchmark="vqav2", title="VQAv2")
    write_suite_report(tmp_path, read_results(tmp_path))
    assert "| VQAv2<br>test | not scored | 3 | 0 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.html").read_text().count("<svg") == 1


def test_own_datasets_have_no_empty_tables_and_no_published_figures(tmp_path: pathlib.Path) -> None:
    own = [
        write_cell(
            tmp_path,
            vqa_predictions(8, 0.5),
            benchmark=name,
            shots=shots,
            references={},
            title=name,
        )
        for name in ("mine", "yours")
        for shots in (0, 4)
    ]
    write_suite_report(tmp_path, own)
    for file in ("report.html", "report.md"):
        text = (tmp_path / file).read_text()
        assert "Annotation files" not in text and "Published figures" not in text
        assert "Protocol" in text
    text = (tmp_path / "report.html").read_text()
    # The charts stand side by side, and a score is in the same line as its error.
    assert text.count('<div class="benchmark alone">') == 2 and 'class="beside' not in text
    assert re.search("[0-9.]+\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}[0-9.]+</td>", text)


def test_columns_of_numbers_are_aligned_to_the_right() -> None:
    rows = [["a", "1,200", "1.5 ± 0.1", "12ab", "1.0.2"], ["b", "–", "-3.0", "7", "2"]]
    header = ["", "n", "score", "digest", "version"]
    assert markdown_table(header, rows).split("\n")[1] == "| --- | ---: | ---: | --- | --- |"


def test_samples_are_the_worst_and_some_others(suite: pathlib.Path) -> None:
    cell = next(one for one in read_results(suite) if one.name == "okvqa.8_shots.random")
    samples = choose_samples(suite, cell)
    assert [one.score for one in samples[:8]] == [0.0] * 8 and len(samples) == 12
    assert samples[-1].score == 1.0
    assert choose_samples(suite, dataclasses.replace(cell, predictions="none.jsonl")) == []


def test_the_spread_of_seeds_is_around_their_mean(tmp_path: pathlib.Path) -> None:
    cells = [
        write_cell(tmp_path, vqa_predictions(4, share), seed=seed)
        for seed, share in ((0, 0.0), (1, 1.0))
    ]
    found = summarise_seeds(cells)
    assert found.score == 50 and found.reach == pytest.approx(100 / np.sqrt(2))
    assert (found.low, found.high) == (50 - found.reach, 50 + found.reach)


def test_a_chart_has_no_scores_that_cannot_be(tmp_path: pathlib.Path) -> None:
    # The interval of two right answers in three reaches far above 100, of one in three below 0.
    ticks = []
    for number, right in enumerate((1, 2)):
        asked = [
            dataclasses.replace(one, text="red" if place < right else "blue", cluster="")
            for place, one in enumerate(vqa_predictions(3, 0.5))
        ]
        cell = write_cell(tmp_path, asked, benchmark=f"own{number}", shots=0)
        assert 100 * cell.estimate.low < 0 or 100 * cell.estimate.high > 100
        drawn = shot_chart(rows_of([cell]))
        ticks += [
            float(text.replace("−", "-"))
            for text in re.findall(r"<text[^>]*>(−?[0-9.]+)</text>", drawn)
        ]
    assert ticks and min(ticks) >= 0 and max(ticks) <= 100
