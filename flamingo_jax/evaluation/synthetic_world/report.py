"""Runs the quickstart's suite and writes its report: a model beside a baseline trained without
images.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_jax.evaluation.charts import Series
from flamingo_jax.evaluation.datasets import DatasetReader
from flamingo_jax.evaluation.media import Preprocessing
from flamingo_jax.evaluation.suites.evaluation_run import BASELINE, MODEL, EvaluationRun
from flamingo_jax.evaluation.synthetic_world import benchmarks as synthetic_world
from flamingo_jax.evaluation.synthetic_world.benchmarks import BINDING_SHOTS, SPLITS
from flamingo_jax.evaluation.synthetic_world.page import Highlight, write_report
from flamingo_jax.web_page import Table

COLUMNS = ("seen pairs", "unseen pairs", "seen, without images", "unseen, without images")
BINDING_SHOWN = 4
"""The number of shots at which the page shows predictions of fast concept binding."""


HEADLINES = {
    "caption_one_object": "Captions of one object",
    "caption_two_objects": "Captions of two objects",
    "vqa_accuracy": "Questions",
    "video_direction_accuracy": "Directions of motion",
}
"""Headline metric -> its title on the page."""


def evaluate_synthetic_world(
    run: EvaluationRun,
    datasets: DatasetReader,
    *,
    few_shots: Sequence[int],
    limit: int,
    few_shot_limit: int,
) -> None:
    """Runs the suite and writes report.json and report.html.

    Args:
      datasets: reads the suite's datasets, by their names.
      few_shots: the numbers of shots of the few-shot benchmarks.
      limit, few_shot_limit: see `synthetic_world.read_suite`.

    Raises: UserError, before any weights are loaded, where there are too few examples.
    """
    config = run.config()
    suite = synthetic_world.read_suite(datasets.records, limit=limit, few_shot_limit=few_shot_limit)
    synthetic_world.check_suite(suite, run.settings, few_shots)
    engines, about = run.load()
    results = {
        name: synthetic_world.run_suite(suite, engine, run.settings, few_shots)
        for name, engine in engines.items()
    }
    metrics = {name: synthetic_world.metrics_of(result) for name, result in results.items()}
    seconds = run.all_seconds()
    report = metrics[MODEL] | {
        BASELINE: metrics.get(BASELINE),
        "counts": synthetic_world.prediction_counts(results[MODEL]),
        "seconds": seconds,
        **about,
    }
    shown = [
        (f"{HEADLINES[metric]}, {split} pairs", one)
        for (split, metric), one in results[MODEL].headline.items()
    ]
    write_report(
        run.output,
        report,
        title="Flamingo on the synthetic world",
        tables=[*_tables(metrics, few_shots), _seconds_table(seconds)],
        results=[
            *shown,
            (f"New words, {BINDING_SHOWN} shots", results[MODEL].concept_binding[BINDING_SHOWN]),
        ],
        how=Preprocessing.of(config),
        training=run.all_curves(),
        highlights=_highlights(metrics),
        lines={"A new word bound in the prompt: accuracy": _binding_lines(metrics)},
    )


def _highlights(metrics: Mapping[str, Any]) -> list[Highlight]:
    """Chooses the metrics at the top of the page, beside the baseline."""
    mine, other = metrics[MODEL], metrics.get(BASELINE)
    shown = [
        Highlight(
            f"{name}, unseen pairs",
            mine["unseen"][metric],
            "without images",
            other["unseen"][metric] if other else None,
        )
        for metric, name in HEADLINES.items()
    ]
    shots = str(BINDING_SHOWN)
    binding = mine["binding_accuracy"][shots]
    return [*shown, Highlight(f"New words after {shots} examples", binding, "by chance", 0.5)]


def _tables(metrics: Mapping[str, Any], few_shots: Sequence[int]) -> list[Table]:
    """Makes the tables of the page."""
    mine, other = metrics[MODEL], metrics.get(BASELINE, {})

    def row(name: str, *keys: str) -> list[Any]:
        """Makes a row: the model's value for each split, then the baseline's."""
        cells: list[Any] = [name]
        for found in (mine, other):
            for split in SPLITS:
                value: Any = found
                for key in (split if key == "SPLIT" else key for key in keys):
                    value = value.get(key, {})
                cells.append(None if value == {} else value)
        return cells

    types = sorted({t for split in SPLITS for t in mine["vqa_by_type"][split]})
    named = [(name.replace("_", " "), part) for name, part in metrics.items()]
    shots = [str(n) for n in BINDING_SHOTS]
    return [
        Table(
            "New images, zero-shot",
            ["", *COLUMNS],
            [row(metric, "SPLIT", metric) for metric in mine["seen"]],
        ),
        Table(
            "A word bound in the prompt, 2-way, by shots",
            ["", *shots],
            [[name, *(part["binding_accuracy"][n] for n in shots)] for name, part in named],
        ),
        Table(
            "Few-shot, by shots",
            ["", *map(str, few_shots)],
            [
                [f"{task}, {name}", *part["few_shot"][task].values()]
                for name, part in named
                for task in part["few_shot"]
            ],
        ),
        Table(
            "Questions by type",
            ["", *COLUMNS],
            [row(name, "vqa_by_type", "SPLIT", name) for name in types],
        ),
    ]


def _seconds_table(seconds: Mapping[str, float]) -> Table:
    rows = [[name, f"{value:.0f}"] for name, value in seconds.items()]
    return Table("Wall time", ["stage", "seconds"], rows)


def _binding_lines(metrics: Mapping[str, Any]) -> dict[str, Series]:
    return {
        name.replace("_", " "): (list(BINDING_SHOTS), list(part["binding_accuracy"].values()))
        for name, part in metrics.items()
    }
