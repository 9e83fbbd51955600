"""Scores of an export on a split, against the metric's definition on answers that are asked for
here.
"""

import dataclasses
import pathlib

import numpy as np
import pytest

from data_pipelines.build.synthetic_world import build_quickstart
from data_pipelines.evaluation_data import PreparedDatasets
from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.scoring.captions import score_captions
from flamingo_jax.experiment import DatasetConfig, Experiment
from flamingo_jax.fine_tuning.config import FineTuningConfig
from flamingo_jax.fine_tuning.scoring import score_split
from flamingo_jax.inference.decoding import DecodingConfig
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.loading import load_flamingo
from flamingo_jax.processing.visuals import Image
from tests.inference.tiny_models import make_export

QUESTIONS = DatasetConfig("questions", frames=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("scoring")
    build_quickstart(folder / "data", limit=24)
    make_export(folder / "model" / "export")
    return folder


def experiment(folder: pathlib.Path, dataset: DatasetConfig, **scoring: object) -> Experiment:
    given = {"max_tokens": 3, "beam_size": 1} | scoring
    return Experiment(
        data={"own": dataset},
        fine_tuning=FineTuningConfig(**given),  # type: ignore[arg-type]
    )


def test_roc_auc_is_the_share_of_pairs_in_order(folder: pathlib.Path) -> None:
    path, datasets = str(folder / "data" / "vqa"), PreparedDatasets()
    records = datasets.records(path, "test", "questions")
    dataset = dataclasses.replace(QUESTIONS, path=path)
    engine = Engine(load_flamingo(folder / "model" / "export"), batch_size=8)
    answers = [bytes(record["answers"][0]).decode() for record in records]
    positive, negative = sorted(set(answers))[:2]
    asked = [
        [
            Image(bytes(record["frames"][0])).visual(engine.config.vision, 1),
            f"Question: {bytes(record['question']).decode()} Answer:",
        ]
        for record in records
    ]
    rows = engine.log_likelihoods(asked, [[f" {negative}", f" {positive}"]] * len(asked))
    odds = {True: [], False: []}  # type: dict[bool, list[float]]
    for answer, (first, second) in zip(answers, rows, strict=True):
        odds[answer == positive].append(second - first)
    pairs = [(a > b) + (a == b) / 2 for a in odds[True] for b in odds[False]]
    made = experiment(folder, dataset, metric="roc_auc", classes=(negative, positive))
    found = score_split(folder / "model" / "export", made, "test", 0, datasets)
    assert found.score == pytest.approx(np.mean(pairs), abs=1e-9)
    assert found.low <= found.score <= found.high and found.records == len(records)
    other = experiment(folder, dataset, metric="roc_auc", classes=("a", "b"))
    with pytest.raises(UserError, match="all records of the split 'test' are not 'b'"):
        score_split(folder / "model" / "export", other, "test", 0, datasets)


def test_captions_are_scored_by_cider_after_the_image_alone(folder: pathlib.Path) -> None:
    path, datasets = str(folder / "data" / "caption_one"), PreparedDatasets()
    records = datasets.records(path, "test", "pairs")
    engine = Engine(load_flamingo(folder / "model" / "export"), batch_size=8)
    asked = [[Image(bytes(r["image"])).visual(engine.config.vision, 1)] for r in records]
    texts = [one.text.strip() for one in engine.generate(asked, DecodingConfig(max_tokens=3))]
    truths = [
        [bytes(c).decode().removeprefix(" ").removeprefix("Output: ") for c in r["captions"]]
        for r in records
    ]
    expected, _ = score_captions(texts, truths)
    made = experiment(folder, DatasetConfig("pairs", path), metric="cider")
    found = score_split(folder / "model" / "export", made, "test", 0, datasets)
    assert found.score == pytest.approx(expected["CIDEr-D"].score, abs=1e-9) and found.score > 0
