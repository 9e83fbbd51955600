"""What scoring a file of predictions yields, and which predictions are scored."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.statistics import Estimate

SHOWN = 5
"""Ids that an error lists."""


@dataclasses.dataclass(frozen=True)
class ScoreReport:
    """The scores of a set of predictions.

    metrics: {name: score with its error}.
    items: each item's scores, {"id": ..., metric: score}.
    about: the rules and the files by which they were made.
    missing: ids without a prediction, and `surplus`: predictions for no known id; neither is
      scored.
    """

    metrics: dict[str, Estimate]
    items: list[dict[str, Any]]
    about: dict[str, Any]
    missing: Sequence[Any] = ()
    surplus: Sequence[Any] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the report without the items, as JSON can hold it."""
        return {
            "metrics": {name: _numbers(estimate) for name, estimate in self.metrics.items()},
            "items": len(self.items),
            "missing": list(self.missing),
            "surplus": list(self.surplus),
            **self.about,
        }


def _numbers(estimate: Estimate) -> dict[str, Any]:
    low, high = _finite(estimate.low), _finite(estimate.high)
    return {
        "score": _finite(estimate.score),
        "standard_error": _finite(estimate.standard_error),
        "interval_95": None if low is None or high is None else [low, high],
    }


def _finite(value: float) -> float | None:
    """Returns a number that JSON can hold, None for NaN."""
    return float(value) if math.isfinite(value) else None


@dataclasses.dataclass(frozen=True)
class Matched:
    """Which ids are scored, in the references' order, and which are not."""

    scored: list[Any]
    missing: list[Any]
    surplus: list[Any]


def match(
    references: Collection[Any], predictions: Collection[Any], what: str, skip_incomplete: bool
) -> Matched:
    """Pairs the ids of references and predictions.

    Args:
      what: of what the ids are, such as "image".
      skip_incomplete: whether to go on with the ids that have both.

    Raises: UserError for ids that have only one of both, unless they are skipped, and where none
      has both.
    """
    known, given = set(references), set(predictions)
    matched = Matched(
        [key for key in references if key in given],
        [key for key in references if key not in given],
        [key for key in predictions if key not in known],
    )
    if not matched.scored:
        raise UserError(
            f"no {what} has both a prediction and a reference: predictions begin with"
            f" {_some(list(predictions))}, references with {_some(list(references))}"
        )
    for ids, problem in (
        (matched.missing, "no prediction"),
        (matched.surplus, "a prediction but no reference"),
    ):
        if ids and not skip_incomplete:
            raise UserError(
                f"{len(ids):,} {what}s have {problem} ({_some(ids)}): complete the predictions, or"
                " score the rest with --skip_incomplete"
            )
    return matched


def _some(ids: Sequence[Any]) -> str:
    """Lists the first ids."""
    shown = ", ".join(str(key)[:80] for key in ids[:SHOWN])
    return f"{shown}, ..." if len(ids) > SHOWN else shown or "none"
