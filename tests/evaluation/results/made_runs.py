"""Makes the files of a finished suite, without a model: predictions are made up and scored."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flamingo_jax.evaluation.protocol.benchmark import Prediction
from flamingo_jax.evaluation.protocol.journal import JournalFile
from flamingo_jax.evaluation.results.result_file import CellResult
from flamingo_jax.evaluation.scoring.predictions import score_predictions

CAPTIONS = ("a dog runs on the grass", "two red cars in a street", "a cat sleeps on a sofa")


def vqa_predictions(n: int, share: float, seed: int = 0) -> list[Prediction]:
    """Two questions to each image, of which about `share` are answered right."""
    right = np.random.default_rng(seed).random(n) < share
    return [
        Prediction(
            f"q{number}",
            f"<image>Question: how many, {number}? Answer: 3<EOC><image>Question: what colour"
            f" is it, {number}? Answer:",
            "red" if right[number] else "blue",
            ("red",) * 10,
            details={"types": {"question_type": ("colour", "number")[number % 2]}},
            cluster=f"image{number // 2}",
        )
        for number in range(n)
    ]


def caption_predictions(n: int, share: float, seed: int = 0) -> list[Prediction]:
    """Captions of which about `share` are those of their images."""
    right = np.random.default_rng(seed).random(n) < share
    return [
        Prediction(
            f"c{number}",
            "<image>Output:",
            CAPTIONS[(number + (not right[number])) % 3],
            (f"{CAPTIONS[number % 3]} number {number}", CAPTIONS[number % 3]),
        )
        for number in range(n)
    ]


def write_cell(
    output: pathlib.Path,
    predictions: Sequence[Prediction],
    *,
    benchmark: str = "okvqa",
    title: str = "OK-VQA",
    scorer: str = "vqa",
    shots: int = 4,
    selection: str = "random",
    control: bool = False,
    seed: int = 0,
    protocol: dict[str, Any] | None = None,
    **fields: Any,
) -> CellResult:
    """Writes a cell's predictions and result; returns the result."""
    parts = [benchmark, f"{shots}_shots", *([selection] if shots else [])]
    parts += [*(["control"] if control else []), *([f"seed{seed}"] if seed else [])]
    name = ".".join(parts)
    protocol = {"benchmark": benchmark, "shots": shots, "decoding": {"beam_size": 3}} | (
        protocol or {}
    )
    journal = JournalFile(
        output / f"predictions/{name}.jsonl",
        {"protocol": protocol, "scorer": scorer, "scorer_options": {}},
    )
    journal.append([one.to_json() for one in predictions])
    journal.close()
    report = score_predictions(scorer, predictions)
    result = CellResult(
        **{
            "benchmark": benchmark,
            "title": title,
            "split": "test",
            "support_split": "train",
            "shots": shots,
            "selection": selection if shots else "",
            "control": control,
            "seed": seed,
            "permutations": 1,
            "headline": next(iter(report.metrics), ""),
            "metrics": report.to_json()["metrics"],
            "about": report.about,
            "n": len(predictions),
            "missing_media": {"policy": "error", "queries": 0, "support": 0},
            "references": {f"{benchmark}.json": "5e" * 32},
            "protocol": protocol,
            "protocol_hash": hashlib.sha256(json.dumps(protocol).encode()).hexdigest(),
            "model": {"folder": "exports/flamingo", "digest": "d1" * 16},
            "code": {"version": "1.0", "digest": "c0" * 16},
            "device": "cpu",
            "batch_size": 64,
            "seconds": 12.5,
            "seconds_waiting_for_media": 0.1,
            "predictions": f"predictions/{name}.jsonl",
            **fields,
        }
    )
    (output / "results").mkdir(parents=True, exist_ok=True)
    result.write(output / f"results/{name}.json")
    return result


def write_suite(output: pathlib.Path, skill: float = 0.0, n: int = 40, **fields: Any) -> None:
    """Writes a suite of two benchmarks: 0, 4 and 8 shots, controls, two seeds at 4 shots."""
    made: tuple[tuple[Callable[..., list[Prediction]], dict[str, Any]], ...] = (
        (vqa_predictions, {}),
        (
            caption_predictions,
            {"benchmark": "coco", "title": "COCO captions", "scorer": "captions"},
        ),
    )
    for make, about in made:
        for shots in (0, 4, 8):
            for seed in (0, 1) if shots == 4 else (0,):
                share = 0.3 + 0.05 * shots + skill
                cell = {**about, "shots": shots, "seed": seed, **fields}
                write_cell(output, make(n, share, seed), **cell)
                if shots:
                    write_cell(output, make(n, 0.4, seed), control=True, **cell)
