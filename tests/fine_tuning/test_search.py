"""The search with stand-ins for training and scoring: what is done once, what is chosen, what
happens to a cell that fails and to a signal.
"""

import json
import math
import pathlib
from collections.abc import Callable

import pytest

from flamingo_jax.errors import NotFiniteError, UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.fine_tuning import search
from flamingo_jax.fine_tuning.grid import cells, parse_grid
from flamingo_jax.fine_tuning.results import markdown, with_interval
from flamingo_jax.fine_tuning.scoring import SplitScore
from flamingo_jax.fine_tuning.search import Search

SCORES = {1: 0.25, 2: 0.75, 3: 0.5, 9: 0.9}
"""{steps of a cell: its validation score}."""
Make = Callable[..., Search]


class Fakes:
    """Stands in for training, exporting and scoring; `done` lists what was called."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.codes: dict[int, int] = {}
        self.model = "m"

    def train(self, experiment: Experiment, folder: pathlib.Path) -> int:
        steps = experiment.training.steps
        self.done.append(f"train {steps}")
        lines = [{"step": 0, "resume": 0, "time": 0.0, "seconds": {"start": 1.0}}]
        (folder / "goodput.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "held_out/loss": 1 / steps}))
        if steps == 4:
            raise NotFiniteError("too many steps were not finite")
        return self.codes.get(steps, 0)

    def score(
        self, export: pathlib.Path, experiment: Experiment, split: str, limit: int
    ) -> SplitScore:
        steps = experiment.training.steps
        self.done.append(f"{split} {steps}")
        assert export.exists() and limit == (5 if split == "validation" else 0)
        value = SCORES[steps] if split == "validation" else 0.125
        return SplitScore(value, value - 0.125, value + 0.125, 40)

    def export_run(
        self, workdir: pathlib.Path, output: pathlib.Path, *, trained_only: bool = False
    ) -> None:
        self.done.append(f"export {'' if trained_only else 'whole '}{workdir.name}")
        output.mkdir()
        (output / "model").write_text(workdir.name)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes()
    monkeypatch.setattr(search, "export_run", made.export_run)
    monkeypatch.setattr(search, "_digest", lambda experiment: made.model)
    return made


@pytest.fixture
def make(fakes: Fakes, tmp_path: pathlib.Path) -> Make:
    def search_of(steps: str) -> Search:
        experiment = Experiment()
        grid = cells(parse_grid([f"steps={steps}", "fine_tuning.limit=5"], experiment), experiment)
        return Search(tmp_path, grid, "vqa_accuracy", fakes.train, fakes.score)

    return search_of


def name(steps: int) -> str:
    return f"fine_tuning.limit=5,steps={steps}"


def test_the_best_cell_by_validation_is_tested_once(
    make: Make, fakes: Fakes, tmp_path: pathlib.Path
) -> None:
    code, table = make("1,2,3").run()
    per_cell = [(f"train {n}", f"export {name(n)}", f"validation {n}") for n in (1, 2, 3)]
    expected = [*sum(per_cell, ()), "test 2", f"export whole {name(2)}"]
    assert code == 0 and fakes.done == expected
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["best"] == name(2) and found["unfinished"] == 0
    assert found["test"] == {"score": 0.125, "interval_95": [0.0, 0.25], "records": 40}
    assert markdown(table) == (
        "| steps | fine_tuning.limit | loss | vqa_accuracy (95 %) | seconds |  |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| 1 | 5 | 1.0000 | 25.0 (12.5 to 37.5) | 1 |  |\n"
        "| 2 | 5 | 0.5000 | 75.0 (62.5 to 87.5) | 1 | best |\n"
        "| 3 | 5 | 0.3333 | 50.0 (37.5 to 62.5) | 1 |  |\n"
        "|  |  |  | 12.5 (0.0 to 25.0) |  | test, 40 records |\n"
    )
    assert (tmp_path / "results.md").read_text() == markdown(table)
    fakes.done.clear()
    assert make("1,2,3").run() == (0, table) and not fakes.done


def test_a_larger_grid_runs_its_new_cells_alone(
    make: Make, fakes: Fakes, tmp_path: pathlib.Path
) -> None:
    make("1,2").run()
    fakes.done.clear()
    make("1,2,3").run()
    assert fakes.done == ["train 3", f"export {name(3)}", "validation 3"]
    fakes.done.clear()
    make("2,9").run()
    assert fakes.done[3:] == ["test 9", f"export whole {name(9)}"]
    assert (tmp_path / "best" / "model").read_text() == name(9)


def test_a_cell_that_is_not_finite_is_listed_and_the_rest_goes_on(
    make: Make, fakes: Fakes, tmp_path: pathlib.Path
) -> None:
    code, table = make("4,1").run()
    assert code == 0 and "not finite" in markdown(table)
    assert json.loads((tmp_path / "results.json").read_text())["best"] == name(1)
    fakes.done.clear()
    with pytest.raises(UserError, match="all cells failed .not finite.: try smaller learning"):
        make("4").run()
    assert not fakes.done


def test_a_signal_ends_the_search_with_trainings_code(
    make: Make, fakes: Fakes, tmp_path: pathlib.Path
) -> None:
    fakes.codes[2] = 75
    code, table = make("1,2").run()
    assert code == 75 and len(table.rows) == 1
    assert json.loads((tmp_path / "results.json").read_text())["unfinished"] == 1
    fakes.codes.clear()
    fakes.done.clear()
    assert make("1,2").run()[0] == 0 and fakes.done[0] == "train 2"


def test_another_model_is_refused(make: Make, fakes: Fakes) -> None:
    make("1").run()
    fakes.model = "other"
    with pytest.raises(UserError, match="was trained from another model than"):
        make("1").run()


def test_a_score_without_an_interval_is_written_alone() -> None:
    assert with_interval(SplitScore(1.381, math.nan, math.nan, 1)) == "138.1"
