"""What every maker of rows shares: a dataset's records, the plan of its rows, and what failed."""

import dataclasses
from collections.abc import Sequence

from data_pipelines.records import DamagedError, Failures, Record, RecordCache
from data_pipelines.row_plans import RowPlans, RowSpec
from data_pipelines.transforms.examples import Arrays, Segment, assemble
from data_pipelines.transforms.randomness import RecordRandom
from flamingo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RowContext:
    """The parts that rows are made from. Safe to use from several threads."""

    spec: RowSpec
    records: RecordCache
    plans: RowPlans
    failures: Failures

    def random(
        self, epoch: int, record_id: str, caption: tuple[int, bool] | None = None
    ) -> RecordRandom | None:
        """What is random about a visit of a record; None where nothing is."""
        spec = self.spec
        if not spec.training:
            return None
        return RecordRandom(spec.seed, epoch, record_id, caption, dataset=spec.name)

    def require_whole(self, place: int, record: Record) -> None:
        """Raises DamagedError where a record's bytes are damaged, or were when it was measured."""
        if record.damaged or self.plans.was_damaged(place):
            raise DamagedError

    def require_length(
        self, place: int, record: Record, tokens: int, caption: tuple[int, bool] | None
    ) -> None:
        """Raises UserError where a record is not as long as it was when it was measured: its row
        would have no room for it, or not show all.
        """
        measured, dataset = self.plans.length(place, caption), self.spec.dataset
        if measured is None:
            return
        if dataset.kind in ("pairs", "videos"):
            measured = min(measured, dataset.max_length)
        # Of a question with several answers the longest was measured.
        if tokens > measured or (tokens < measured and dataset.kind != "questions"):
            raise self.changed(record, f"{tokens} tokens, where {measured} were measured")

    def changed(self, record: Record, what: str) -> UserError:
        """The error for a record that is not what it was when it was measured."""
        return UserError(
            f"the record {record.id!r} of the dataset {self.spec.shown_name} has {what}: its files"
            " were changed since; remove the files lengths_* that lie beside them and start again"
        )

    def assemble(self, rows: Sequence[Sequence[Segment]]) -> Arrays:
        """The token arrays of rows, as their task takes them."""
        spec = self.spec
        arrays = assemble(rows, length=spec.dataset.max_length, pad_token=spec.tokenizer.pad)
        if spec.task == "language_modelling":
            del arrays["media_index"]
        return arrays
