"""Runs a suite of benchmarks on a model. Each run (`cells.SuiteCell`) keeps its predictions as
they are made; a suite that was killed goes on where it was.

    OUTPUT/results/<cell>.json          scores with error bars, and what they are of
    OUTPUT/predictions/<cell>.jsonl     every prediction, with its prompt
    OUTPUT/submissions/<cell>.json      answers in the form that the benchmark's owners score
    OUTPUT/shots, OUTPUT/features       the chosen shots; the encoder's features for RICES
    OUTPUT/report.html, report.md       scores, controls, samples and what was run
    OUTPUT/charts/<benchmark>.svg       scores by the number of shots
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from rich.console import Console

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.media import Preprocessing
from flamingo_jax.evaluation.protocol.classification import Classification
from flamingo_jax.evaluation.protocol.few_shot import check_fits, few_shot_prompts
from flamingo_jax.evaluation.protocol.journal import JournalFile
from flamingo_jax.evaluation.protocol.open_ended import OpenEnded
from flamingo_jax.evaluation.results.result_file import (
    PAPER_SCALE,
    CellResult,
    read_result,
    read_results,
)
from flamingo_jax.evaluation.results.samples import VisualOf
from flamingo_jax.evaluation.results.suite_report import write_suite_report
from flamingo_jax.evaluation.scoring.predictions import score_predictions
from flamingo_jax.evaluation.scoring.submission import write_submission
from flamingo_jax.evaluation.suites.cells import (
    SuiteBenchmark,
    SuiteCell,
    SuiteOptions,
    cells,
    digest,
)
from flamingo_jax.evaluation.suites.evaluation_run import EvaluationRun
from flamingo_jax.experiment import FlamingoConfig
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.loading import load_flamingo, open_flamingo
from flamingo_jax.paths import make_folder
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.processing.visuals import Visual
from flamingo_jax.web_page import Table


@dataclasses.dataclass(frozen=True)
class EvaluatedModel:
    """What a suite is run on.

    folder: of the export. digest: of its parameters.
    frozen_dtype: of its frozen parts; None for the export's own.
    """

    folder: str
    digest: str
    frozen_dtype: str | None = None

    def made(self, result: CellResult) -> bool:
        """Returns whether a result is of this model."""
        found = result.model["digest"], result.model.get("frozen_dtype")
        return found == (self.digest, self.frozen_dtype)


def evaluate_suite(
    run: EvaluationRun, benchmarks: Sequence[SuiteBenchmark], options: SuiteOptions
) -> list[CellResult]:
    """Runs benchmarks on a model, and writes report.html, report.md and report.json.

    What an earlier run with the same output finished is not run again.

    Raises: UserError, before any weights are loaded, where a benchmark has too few examples, a
      prompt does not fit in the model's context, or the output holds results of something else.
    """
    config, tokenizer, model_digest = open_flamingo(run.model, run.parts)
    listed = [cell for one in benchmarks for cell in cells(one, options)]
    check_prompts(listed, config, tokenizer)

    model = EvaluatedModel(run.model, model_digest, run.frozen_dtype)

    def load() -> Engine:
        loaded = load_flamingo(
            run.model, parts=run.parts, mesh=run.mesh, frozen_dtype=run.frozen_dtype
        )
        return Engine(loaded, batch_size=run.batch_size)

    results = run_cells(listed, load, model, run.output, wordnet=options.wordnet)
    if jax.process_index() == 0:
        write_reports(run, listed, model)
    return results


def write_reports(run: EvaluationRun, listed: Sequence[SuiteCell], model: EvaluatedModel) -> None:
    """Writes report.html and report.md of all results of the model in the output folder, and
    report.json, which the model card reads.
    """
    results = [one for one in read_results(run.output) if model.made(one)]
    by_benchmark: dict[str, dict[str, dict[str, Any]]] = {}
    counts: dict[str, dict[str, int]] = {}
    for one in results:
        if not one.control and one.seed == listed[0].settings.seed:
            scores = {name: metric["score"] for name, metric in one.metrics.items()}
            by_benchmark.setdefault(one.benchmark, {})[str(one.shots)] = scores
            counts.setdefault(one.benchmark, {})[str(one.shots)] = one.n
    report = {
        "metrics_are": "fractions between 0 and 1; CIDEr from 0 to 10",
        "benchmarks": by_benchmark,
        "counts": counts,
        "model": {"folder": run.model, "digest": model.digest},
        "settings": dataclasses.asdict(run.settings),
        "frozen_dtype": run.frozen_dtype,
        "results": [f"results/{one.name}.json" for one in results],
    }
    (run.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    how = Preprocessing.of(run.config(), run.settings.frames, run.settings.fps)
    visuals = {cell.benchmark.asked.name: _visuals(cell.benchmark.asked, how) for cell in listed}
    write_suite_report(run.output, results, visuals=visuals)


def _visuals(asked: Any, how: Preprocessing) -> VisualOf:
    """Returns what reads the image or clip of a query by its id."""
    media = {query.id: query.media for query in getattr(asked, "queries", ())}
    media |= {page.id: page.media[-1] for page in getattr(asked, "pages", ())}

    def visual_of(query: str) -> Visual | None:
        return media[query].read(how) if query in media else None

    return visual_of


def summary(results: Sequence[CellResult]) -> Table:
    """Makes a table of the headline scores with their errors, on the papers' scale, for the
    console.
    """
    rows = [
        [
            one.title,
            f"{one.shots}{', without their images' if one.control else ''}",
            one.headline,
            f"{PAPER_SCALE * one.estimate.score:.1f}",
            f"{PAPER_SCALE * one.estimate.standard_error:.1f}",
            one.n,
        ]
        for one in results
    ]
    return Table("Scores", ["benchmark", "shots", "metric", "score", "error", "queries"], rows)


def run_cells(
    listed: Sequence[SuiteCell],
    load: Callable[[], Engine],
    model: EvaluatedModel,
    output: pathlib.Path,
    *,
    wordnet: str = "",
) -> list[CellResult]:
    """Runs what is not finished, and writes its results.

    Args:
      load: loads the model; it is called where anything is left to run.
      model: what will be loaded.
      output: the folder of results.
      wordnet: folder of WordNet's files, see `SuiteOptions`.

    Raises: UserError where `output` holds results of another protocol, files or model.
    """
    results = {cell.name: _earlier(cell, output, model) for cell in listed}
    left = [cell for cell in listed if results[cell.name] is None]
    engine, began = (load() if left else None), time.monotonic()
    for number, cell in enumerate(left, 1):
        assert engine is not None
        found = results[cell.name] = run_cell(cell, engine, model, output, wordnet)
        # A prompt with n shots takes about as long as n + 1 without.
        done, to_do = (sum(map(_prompts, some)) for some in (left[:number], left[number:]))
        seconds = (time.monotonic() - began) / done * to_do
        _say(f"{number} of {len(left)} runs: {found}, {seconds / 60:.0f} minutes left")
    return [found for found in results.values() if found is not None]


def _prompts(cell: SuiteCell) -> int:
    asked: Any = cell.benchmark.asked
    count = len(getattr(asked, "queries", None) or asked.pages)
    return count * (1 + cell.settings.shots)


def _say(text: str) -> None:
    if jax.process_index() == 0:
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)


def run_cell(
    cell: SuiteCell,
    engine: Engine,
    model: EvaluatedModel,
    output: pathlib.Path,
    wordnet: str = "",
) -> CellResult:
    """Runs one benchmark at one number of shots, and writes its result and predictions."""
    began = time.monotonic()
    benchmark, how = cell.benchmark, cell.settings
    first = jax.process_index() == 0
    relative = f"predictions/{cell.name}.jsonl"
    about = {
        **identity(cell, model.digest),
        "frozen_dtype": model.frozen_dtype,
        "scorer": benchmark.scorer,
        "scorer_options": dict(benchmark.scorer_options),
    }
    journal = JournalFile(output / relative, about, writes=first)
    try:
        found = benchmark.asked.run(engine, how, journal)
    finally:
        journal.close()
    report = score_predictions(
        benchmark.scorer, found.predictions, benchmark.scorer_options, wordnet=wordnet
    )
    content = report.to_json()
    result = CellResult(
        benchmark=benchmark.asked.name,
        title=benchmark.title,
        split=str(benchmark.drawn["split"]),
        support_split=str(benchmark.drawn["support_split"]),
        shots=how.shots,
        selection=how.selection if how.shots else "",
        control=not how.shot_images,
        seed=how.seed,
        permutations=how.permutations,
        headline=next(iter(report.metrics), ""),
        metrics=content["metrics"],
        about=report.about,
        n=len(found.predictions),
        missing_media=dict(benchmark.missing),
        references=dict(benchmark.references),
        protocol=cell.protocol,
        protocol_hash=digest(cell.protocol),
        model={"folder": model.folder, "digest": model.digest, "frozen_dtype": model.frozen_dtype},
        code=code_identity(),
        device=jax.devices()[0].device_kind,
        batch_size=engine.batch_size,
        seconds=round(time.monotonic() - began, 3),
        seconds_waiting_for_media=round(found.waited, 3),
        predictions=relative,
    )
    if first:
        make_folder(output / "results")
        result.write(output / "results" / f"{cell.name}.json")
        if benchmark.official and benchmark.official.submission:
            make_folder(output / "submissions")
            file = output / "submissions" / f"{cell.name}.json"
            write_submission(file, found.predictions, benchmark.official)
    return result


def identity(cell: SuiteCell, model_digest: str) -> dict[str, Any]:
    """Returns what the predictions of a cell depend on."""
    benchmark = cell.benchmark
    return {
        "protocol": cell.protocol,
        "model": model_digest,
        "references": dict(benchmark.references),
        "examples": _examples(benchmark.asked),
    }


def _examples(asked: Any) -> str:
    """Identifies a benchmark's queries and support set by their ids, in order."""
    content = hashlib.blake2b(digest_size=16)
    for examples in (getattr(asked, name, ()) for name in ("queries", "support", "pages")):
        for one in examples:
            content.update(f"{len(one.id)} {one.id}".encode())
        content.update(b"/")
    return content.hexdigest()


def _earlier(cell: SuiteCell, output: pathlib.Path, model: EvaluatedModel) -> CellResult | None:
    """Reads the result of an earlier run, if it is finished."""
    file = output / "results" / f"{cell.name}.json"
    if not file.is_file():
        return None
    found = read_result(file)
    same = {
        "protocol": found.protocol_hash == digest(cell.protocol),
        "model": model.made(found),
        "number of missing images": dict(found.missing_media) == dict(cell.benchmark.missing),
        "references": dict(found.references) == dict(cell.benchmark.references),
    }
    if all(same.values()):
        return found
    differing = ", ".join(name for name, equal in same.items() if not equal)
    raise UserError(
        f"{file} is of another {differing}: remove it and {output / found.predictions}, or name"
        " another --output"
    )


def check_prompts(
    listed: Sequence[SuiteCell], config: FlamingoConfig, tokenizer: Tokenizer
) -> None:
    """Checks, before the model is loaded, that the prompts fit in its context; those of RICES
    are checked when their shots are known.

    Raises: UserError that names the benchmark.
    """
    # The longest prompts are those with the most shots; controls have the same texts.
    longest: dict[tuple[str, int], SuiteCell] = {}
    for cell in listed:
        key = cell.benchmark.asked.name, cell.settings.seed
        if key not in longest or cell.settings.shots > longest[key].settings.shots:
            longest[key] = cell
    for cell in longest.values():
        asked, how = cell.benchmark.asked, cell.settings
        if not isinstance(asked, OpenEnded | Classification):
            continue
        if how.shots and how.selection == "rices":
            continue
        check_fits(asked, few_shot_prompts(asked, None, how), how, config, tokenizer)


@functools.cache
def code_identity() -> dict[str, str]:
    """Identifies the library: its version, and a digest of its source files."""
    import importlib.metadata

    root = pathlib.Path(__file__).parent.parent
    content = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        content.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    try:
        version = importlib.metadata.version("flamingo_jax")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return {"version": version, "digest": content.hexdigest()[:32]}
