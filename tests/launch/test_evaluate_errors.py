"""Evaluation refuses what it cannot run before it reads any weights."""

import dataclasses
import pathlib
from typing import Any

import pytest

from data_pipelines.build.synthetic_world import build_quickstart
from data_pipelines.evaluation_data import PreparedDatasets
from data_pipelines.records import open_records
from flamingo_jax.checkpointing.export import export_model
from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.suites.description import BenchmarkDescription
from flamingo_jax.evaluation.suites.own_datasets import BenchmarkReader
from flamingo_jax.evaluation.suites.reading import open_described
from tests.inference.tiny_models import make_loaded
from tests.launch import commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """`data/`, and `export/` without parameters, which must not be asked for."""
    folder, loaded = tmp_path_factory.mktemp("evaluate"), make_loaded()
    build_quickstart(folder / "data", limit=8)
    loaded.tokenizer.save(folder)
    export_model(
        folder / "export",
        kind="flamingo",
        config=dataclasses.asdict(loaded.config),
        parameters={},
        tokenizer_file=folder / "tokenizer.model",
    )
    return folder


@pytest.mark.parametrize(
    ("benchmarks", "shots", "baseline", "sentence"),
    [
        (
            ["captioning:a={}/ltip:validation", "classification:a={}/ltip:validation"],
            "0",
            "",
            "two benchmarks are named 'a'",
        ),
        (
            ["captioning:a={}/ltip:validation", "captioning:b={}/ltip:validation"],
            "0,900",
            "",
            "a needs 900 support examples",
        ),
        (["reading:a={}/ltip"], "0", "", "with KIND one of captioning"),
        (
            ["captioning:a={}/ltip:validation"],
            "x",
            "",
            "must be numbers with commas between them",
        ),
        (["captioning:a={}/ltip:validation"], "0", "{}", "data is no export"),
    ],
)
def test_what_cannot_be_run(
    folder: pathlib.Path,
    benchmarks: list[str],
    shots: str,
    baseline: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate = commands.load("evaluate")
    values = {
        "MODEL": f"{folder}/export",
        "OUTPUT": f"{folder}/out",
        "BENCHMARK": [b.format(folder / "data") for b in benchmarks],
        "SHOTS": shots.split(","),
        "BASELINE": baseline.format(folder / "data"),
        "SUITE": [],
        "LAYOUT": False,
        "SEEDS": None,
        "WORDNET": "",
        "CONTROL": True,
        "PERMUTATIONS": 1,
        "EVALUATOR": [],
        "BATCH_SIZE": 64,
        "TEXT_EXAMPLES": 2,
        "QUESTION_PROMPT": None,
        "SELECTION": "random",
        "SEED": 0,
        "MAX_TOKENS": 24,
        "BEAM": 3,
        "SECONDS": "",
        "CURVES": [],
        "LIMIT": 0,
        "CAPTION_PROMPT": "Output:",
        "SUPPORT_LIMIT": 2048,
        "CLASSES": "",
        "FRAMES": None,
        "FPS": None,
    }
    for name, value in values.items():
        monkeypatch.setattr(evaluate, name, commands.flag(value))
    with pytest.raises(UserError, match=sentence):
        evaluate.main()
    assert not (folder / "out").exists()


def test_own_questions_are_asked_as_in_training(folder: pathlib.Path) -> None:
    reader = BenchmarkReader(PreparedDatasets(), limit=2)
    described = [
        BenchmarkDescription.parse(f"{kind}:{kind}={folder}/data/{name}")
        for kind, name in (
            ("captioning", "ltip:validation"),
            ("vqa", f"vqa:test,support={folder}/data/vqa:unseen"),
        )
    ]
    trained = dataclasses.replace(reader, trained_prompts=["{question}"])

    def texts(reader: BenchmarkReader, given: int | None) -> list[int]:
        opened = open_described(described, reader, shots=0, text_examples=given, max_tokens=2)
        return [one.text_examples for one in opened]

    assert texts(reader, None) == [2, 2]
    assert texts(trained, None) == [2, 0]
    assert texts(trained, 3) == [3, 3]


def test_a_limit_leaves_every_class_to_choose_from(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Three records' own classes are right by construction."""
    reader = BenchmarkReader(PreparedDatasets(), limit=3, support_limit=2, caption_prompt="Output:")
    text = f"classification:colours={folder}/data/vqa:test"

    def classes(classes_file: pathlib.Path) -> list[str]:
        reading = dataclasses.replace(reader, classes_file=str(classes_file))
        return reading.read(BenchmarkDescription.parse(text), 0, 0).classes  # type: ignore[attr-defined]

    made: Any = reader.read(BenchmarkDescription.parse(text), shots=0, text_examples=0)
    records = open_records(folder / "data" / "vqa", "test", "questions")
    answers = {records[place]["answers"][0].decode() for place in range(len(records))}
    assert len(made.queries) == 3 and set(made.classes) == answers and len(answers) > 3
    description = BenchmarkDescription.parse(text + f",support={folder}/data/vqa:unseen")
    few: Any = reader.read(description, 1, 0)
    assert len(few.support) == 2

    file = tmp_path / "classes.txt"
    file.write_text("red\n\nblue \n")
    assert classes(file) == ["red", "blue"]
    for content, said in (("red\nred\n", "has 'red' more than once"), ("\n", "holds no class")):
        file.write_text(content)
        with pytest.raises(UserError, match=said):
            classes(file)
    file.unlink()
    with pytest.raises(UserError, match="cannot be read as text"):
        classes(file)
