"""Every benchmark, end to end: made files in their official layout, and a tiny model."""

import dataclasses
import importlib
import json
import pathlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest

import flamingo_jax as fj
from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.registry import BENCHMARKS
from flamingo_jax.evaluation.protocol import journal
from flamingo_jax.evaluation.protocol.benchmark import EvaluationSettings
from flamingo_jax.evaluation.results.result_file import CellResult
from flamingo_jax.evaluation.suites.cells import SuiteOptions, cells
from flamingo_jax.evaluation.suites.evaluation_run import EvaluationRun
from flamingo_jax.evaluation.suites.reading import OpeningOptions, open_official
from flamingo_jax.evaluation.suites.running import check_prompts, evaluate_suite
from flamingo_jax.inference.decoding import DecodingConfig
from tests.evaluation import made_sets, small_wordnet
from tests.inference.tiny_models import make_export, make_tokenizer, tiny_config

WORDNET = "wordnet"
MADE: dict[str, Callable[[pathlib.Path], None]] = {}
for module in pkgutil.iter_modules(made_sets.__path__):
    MADE |= getattr(importlib.import_module(f"{made_sets.__name__}.{module.name}"), "MADE", {})


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("suite") / "export"
    make_export(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("sets")
    for name, make in MADE.items():
        (root / name).mkdir()
        make(root / name)
    small_wordnet.write(root / WORDNET)
    return root


def evaluate(
    export: pathlib.Path,
    data: pathlib.Path,
    output: pathlib.Path,
    name: str,
    *,
    batch_size: int = 4,
    selection: str = "random",
    shots: tuple[int, ...] = (0, 4),
    mesh: Any = None,
    **options: Any,
) -> dict[str, CellResult]:
    """Runs one benchmark; returns its results by the names of their files."""
    settings = EvaluationSettings(
        selection=selection,
        folder=str(output),
        decoding=DecodingConfig(beam_size=1),
    )
    run = EvaluationRun(str(export), output, settings, batch_size=batch_size, mesh=mesh)
    benchmarks = open_official([BENCHMARKS[name]], opening(data, **options))
    how = SuiteOptions(settings, shots, wordnet=str(data / WORDNET))
    found = evaluate_suite(run, benchmarks, how)
    return {one.name: one for one in found}


def opening(data: pathlib.Path, **options: Any) -> OpeningOptions:
    fields = {"limit": 6, "max_tokens": 3, "wordnet": str(data / WORDNET), **options}
    return OpeningOptions(root=str(data), **fields)


def test_text_only_examples_are_left_out_as_in_training(data: pathlib.Path) -> None:
    """A model trained on questions met none before a question; captions are asked as ever."""
    named = [BENCHMARKS[name] for name in ("coco", "vqav2")]

    def texts(**options: Any) -> list[int]:
        return [one.text_examples for one in open_official(named, opening(data, **options))]

    assert texts() == [2, 2]
    assert texts(trained_on_questions=True) == [2, 0]
    assert texts(trained_on_questions=True, text_examples=1) == [1, 1]


def predictions(output: pathlib.Path, cell: CellResult) -> list[dict[str, Any]]:
    return journal.read_journal(output / cell.predictions)[1]


def test_every_benchmark_has_a_made_set() -> None:
    assert set(MADE) == set(BENCHMARKS)


ONE_OF_EACH_KIND = (
    "coco",
    "hatefulmemes",
    "open_mini_imagenet_shots_1_ways_2",
    "vqav2",
    "youcook2",
)
ONE_OF_EACH_READER = (
    *ONE_OF_EACH_KIND,
    *("imagenet", "nextqa", "okvqa", "rareact", "star", "visdial", "vizwiz", "vl_icl_clevr"),
)


def scaled(names: list[str], quick: tuple[str, ...]) -> list[Any]:
    """Marks what takes too long for each change."""
    return [
        pytest.param(name, marks=[] if name in quick else [pytest.mark.scale]) for name in names
    ]


@pytest.mark.parametrize("name", scaled(sorted(MADE), ONE_OF_EACH_READER))
def test_a_benchmark_runs_from_its_official_files_and_goes_on_when_killed(
    name: str, export: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A killed run goes on to the same digits."""
    shots = shots_of(name, (0, 4))
    whole = evaluate(export, data, tmp_path / "whole", name, shots=shots)
    check_resumed(export, data, tmp_path, name, whole, shots=shots)


@pytest.mark.parametrize("name", scaled(sorted(MADE), ONE_OF_EACH_KIND))
def test_batches_of_one_answer_as_larger_ones(
    name: str, export: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shots = shots_of(name, (4,))
    whole = evaluate(export, data, tmp_path / "whole", name, shots=shots, batch_size=16)
    single = evaluate(export, data, tmp_path / "single", name, shots=shots, batch_size=1)
    for key in whole:
        ours, theirs = (
            {one["id"]: one["text"] for one in predictions(tmp_path / folder, some[key])}
            for folder, some in (("whole", whole), ("single", single))
        )
        assert ours == theirs


@pytest.mark.scale
@pytest.mark.parametrize("selection", ["random", "rices"])
@pytest.mark.parametrize("name", sorted(MADE))
def test_a_benchmark_runs_at_every_number_of_shots(
    name: str, selection: str, export: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shots = shots_of(name, (0, 4, 32))
    options: dict[str, Any] = {"shots": shots, "selection": selection, "limit": 4}
    whole = evaluate(export, data, tmp_path / "whole", name, **options)
    assert {cell.shots for cell in whole.values()} == set(shots)
    check_resumed(export, data, tmp_path, name, whole, **options)


def shots_of(name: str, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Returns those of the numbers of shots that a benchmark is run at."""
    most = max(BENCHMARKS[name].shots)
    return tuple(shots for shots in wanted if shots <= most) or BENCHMARKS[name].shots[:1]


def check_resumed(
    export: pathlib.Path,
    data: pathlib.Path,
    folder: pathlib.Path,
    name: str,
    whole: dict[str, CellResult],
    **options: Any,
) -> None:
    """Leaves what a killed run leaves: half of the predictions, a torn line, and no result; and
    goes on from there.
    """
    killed = folder / "killed"
    for cell in whole.values():
        assert cell.n == len(predictions(folder / "whole", cell)) > 0
        lines = (folder / "whole" / cell.predictions).read_text().splitlines(keepends=True)
        kept = lines[: 1 + len(lines) // 2]
        (killed / cell.predictions).parent.mkdir(parents=True, exist_ok=True)
        (killed / cell.predictions).write_text("".join(kept) + lines[-1][:9])
    resumed = evaluate(export, data, killed, name, **options)
    assert set(resumed) == set(whole)
    for key, cell in whole.items():
        assert cell.metrics == resumed[key].metrics
        ours, theirs = predictions(folder / "whole", cell), predictions(killed, resumed[key])
        assert sorted(ours, key=_id) == sorted(theirs, key=_id)


def _id(line: dict[str, Any]) -> str:
    return line["id"]


FIRST = sorted(MADE)[:1]


@pytest.mark.parametrize("name", FIRST)
def test_results_say_what_they_are_of(
    name: str, export: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    found = evaluate(export, data, tmp_path, name, selection="rices", shots=(0, 4))
    assert set(found) == {
        f"{name}.0_shots",
        f"{name}.4_shots.rices",
        f"{name}.4_shots.rices.control",
    }
    for key, cell in found.items():
        written = json.loads((tmp_path / "results" / f"{key}.json").read_text())
        assert written["protocol_hash"] == cell.protocol_hash and len(cell.references) >= 1
        assert cell.control == key.endswith("control")
        for line in predictions(tmp_path, cell):
            assert len(line["shots"]) == cell.shots
            images = 1 if cell.control else 1 + cell.shots
            assert line["prompt"].count("<image>") == images
    assert len({cell.protocol_hash for cell in found.values()}) == 3
    # What is finished is not run again, and other settings are refused.
    for cell in found.values():
        (tmp_path / cell.predictions).unlink()
    again = evaluate(export, data, tmp_path, name, selection="rices", shots=(0, 4))
    assert {key: one.metrics for key, one in again.items()} == {
        key: one.metrics for key, one in found.items()
    }
    assert not any((tmp_path / cell.predictions).exists() for cell in found.values())
    with pytest.raises(UserError, match="is of another protocol: remove it"):
        evaluate(export, data, tmp_path, name, selection="rices", limit=5)


@pytest.mark.parametrize("name", FIRST)
def test_a_missing_image_is_an_error_or_counted(
    name: str, export: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    import shutil

    copied = tmp_path / "data"
    shutil.copytree(data / name, copied / name)
    (benchmark,) = open_official([BENCHMARKS[name]], opening(copied, limit=0))
    asked: Any = benchmark.asked
    lost = asked.queries[0].media.path
    lost.unlink()
    with pytest.raises(UserError, match=f"1 of .* images or videos .*{lost.name}.*--missing_media"):
        evaluate(export, copied, tmp_path / "out", name)
    found = evaluate(
        export, copied, tmp_path / "out", name, shots=(0,), limit=0, missing_media="skip"
    )
    for cell in found.values():
        assert cell.n == len(asked.queries) - 1
        assert cell.missing_media == {"policy": "skip", "queries": 1, "support": 0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shots": (400,)}, "needs 400 support examples"),
        ({"split": "nowhere"}, "has no split 'nowhere'"),
        ({"root": "/nowhere"}, "there is no folder /nowhere/.*--layout"),
    ],
)
@pytest.mark.parametrize("name", FIRST)
def test_what_cannot_be_run_is_said_before_the_model_loads(
    name: str,
    options: dict[str, Any],
    said: str,
    export: pathlib.Path,
    data: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flamingo_jax.evaluation.suites import running

    monkeypatch.setattr(running, "load_flamingo", None)
    root = pathlib.Path(options.pop("root", data))
    with pytest.raises(UserError, match=said):
        evaluate(export, root, tmp_path, name, **options)


@pytest.mark.parametrize("name", FIRST)
def test_prompts_past_the_context_are_refused_before_the_model_loads(
    name: str, data: pathlib.Path
) -> None:
    tokenizer = make_tokenizer()
    language_model = tiny_config(tokenizer.vocab_size).language_model
    positions = dataclasses.replace(language_model.positions, kind="learned", max_length=40)
    config = dataclasses.replace(
        tiny_config(tokenizer.vocab_size),
        language_model=dataclasses.replace(language_model, positions=positions),
    )
    (benchmark,) = open_official([BENCHMARKS[name]], opening(data))
    fitting = cells(benchmark, SuiteOptions(EvaluationSettings(), shots=(0, 1)))
    check_prompts(fitting, config, tokenizer)
    longer = cells(benchmark, SuiteOptions(EvaluationSettings(), shots=(0, 1, 8)))
    with pytest.raises(UserError, match=r"has \d+ tokens, and 3 are to follow, but .* 40 in all"):
        check_prompts(longer, config, tokenizer)


@pytest.mark.scale
@pytest.mark.parametrize("name", ["coco", "hatefulmemes"])
def test_a_mesh_answers_as_one_device(
    name: str, export: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    alone = evaluate(export, data, tmp_path / "alone", name)
    mesh = fj.make_mesh("data=4,model=2")
    several = evaluate(export, data, tmp_path / "several", name, mesh=mesh)
    for key, cell in alone.items():
        ours, theirs = (
            {one["id"]: one["text"] for one in predictions(tmp_path / folder, some[key])}
            for folder, some in (("alone", alone), ("several", several))
        )
        assert ours == theirs and cell.n == several[key].n
