"""The file with the result of one benchmark at one number of shots (a cell of a suite's table).

    OUTPUT/results/<benchmark>.<shots>_shots[.<selection>][.control][.seed<N>].json

Scores are from 0 to 1, CIDEr from 0 to 10; `PAPER_SCALE` times a score is what papers print.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.scoring import files
from flamingo_jax.evaluation.statistics import Estimate

FORMAT = 1
FOLDER = "results"
PAPER_SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class CellResult:
    """A benchmark's scores at one number of shots, and all that they are of.

    title: in reports.
    split, support_split: which examples were asked, and which gave the shots.
    shots: the number of examples before a query.
    selection: how they were chosen; "" without shots.
    control: whether their images were taken away.
    seed: of their choice. permutations: orders of them over which log-likelihoods are averaged.
    headline: the name of the metric that reports show; "" where there are no ground truths, as
      of test splits that the owners score.
    metrics: {name: {"score", "standard_error", "interval_95": [low, high]}}, with null for a
      number that could not be computed.
    about: the rules of the metric, and scores by type of question ("by_type").
    n: number of queries.
    missing_media: {"policy", "queries", "support"}: what was done about examples whose image is
      not there, and how many there were.
    references: {annotation file: SHA-256}.
    protocol: all choices that the score depends on besides model and files; `protocol_hash` is
      its digest.
    model: {"folder", "digest", ...}; code: {"version", "digest"}.
    device, batch_size: where and how it ran, for `seconds`, of which
      `seconds_waiting_for_media` were spent waiting for images.
    predictions: file of the predictions, from the output folder.
    """

    benchmark: str
    title: str
    split: str
    support_split: str
    shots: int
    selection: str
    control: bool
    seed: int
    permutations: int
    headline: str
    metrics: Mapping[str, Mapping[str, Any]]
    about: Mapping[str, Any]
    n: int
    missing_media: Mapping[str, Any]
    references: Mapping[str, str]
    protocol: Mapping[str, Any]
    protocol_hash: str
    model: Mapping[str, Any]
    code: Mapping[str, Any]
    device: str
    batch_size: int
    seconds: float
    seconds_waiting_for_media: float
    predictions: str

    @property
    def name(self) -> str:
        """Returns the name of the cell's files."""
        return pathlib.PurePosixPath(self.predictions).stem

    @property
    def estimate(self) -> Estimate:
        """Returns the headline metric's score with its error; NaN without ground truths."""
        return estimate_of({}) if not self.headline else estimate_of(self.metrics[self.headline])

    @property
    def missing(self) -> int:
        """Returns how many queries and support examples had no image."""
        return sum(int(self.missing_media.get(part, 0)) for part in ("queries", "support"))

    def __str__(self) -> str:
        """Returns its name and score for progress, with half of its 95 % interval, on the papers'
        scale.
        """
        score, _, low, high = (PAPER_SCALE * value for value in self.estimate)
        reach = f" ± {(high - low) / 2:.1f}" if math.isfinite(high - low) else ""
        scored = f"{self.headline} {score:.1f}{reach}" if self.headline else "not scored"
        return f"{self.name}: {scored}"

    def write(self, file: pathlib.Path) -> None:
        """Writes the result as JSON."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def estimate_of(metric: Mapping[str, Any]) -> Estimate:
    """Returns a metric of a result as numbers, NaN for null."""
    low, high = metric.get("interval_95") or (None, None)
    numbers = (metric.get("score"), metric.get("standard_error"), low, high)
    return Estimate(*(math.nan if value is None else float(value) for value in numbers))


def read_result(file: pathlib.Path) -> CellResult:
    """Reads the result of one cell.

    Raises: UserError where the file is missing, malformed or of another format.
    """
    place = str(file)
    content = files.as_dict(files.read_json(place), place)
    if content.get("format") != FORMAT:
        raise UserError(
            f"{place} has the format {content.get('format')!r}, not {FORMAT}: name a result that"
            " launch.evaluate --suite wrote"
        )
    fields = {}
    for field in dataclasses.fields(CellResult):
        if field.name not in content:
            raise UserError(f"{place} has no {field.name!r}: run the benchmark again")
        value = content[field.name]
        if not _fits(value, field.type):
            raise UserError(f"{place} has {field.name!r} of another type: run the benchmark again")
        fields[field.name] = value
    headline = fields["headline"]
    if headline and headline not in fields["metrics"]:
        raise UserError(f"{place} has no metric {headline!r}, its headline: run it again")
    try:
        for metric in fields["metrics"].values():
            estimate_of(metric)
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{place} has a malformed metric: run the benchmark again") from None
    return CellResult(**fields)


def read_results(folder: pathlib.Path) -> list[CellResult]:
    """Reads all results in an output folder, by benchmark, selection and shots, each control
    after its run.

    Raises: UserError where there are none, and as `read_result` does.
    """
    found = sorted((folder / FOLDER).glob("*.json")) if (folder / FOLDER).is_dir() else []
    if not found:
        raise UserError(
            f"{folder} has no {FOLDER}/*.json: name a folder that launch.evaluate --suite wrote"
        )
    return sorted(map(read_result, found), key=_order)


def _order(cell: CellResult) -> tuple[Any, ...]:
    return cell.benchmark, cell.selection, cell.shots, cell.seed, cell.control


def _fits(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (str, int, bool):
        return type(value) is kind
    return isinstance(value, dict)
