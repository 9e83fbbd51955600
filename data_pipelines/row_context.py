"""The state that the makers of text, visual and contrastive rows share, and checks that
records still match their measured lengths.
"""

import dataclasses
from collections.abc import Sequence

from data_pipelines.records import DamagedError, Failures, Record, RecordCache
from data_pipelines.row_plans import RowPlans, RowSpec
from data_pipelines.transforms.examples import Arrays, Segment, assemble
from data_pipelines.transforms.randomness import RecordRandom
from flamingo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RowContext:
    """A dataset's records, the plan of its rows and its failed records. Thread-safe."""

    spec: RowSpec
    records: RecordCache
    plans: RowPlans
    failures: Failures

    def random(
        self, epoch: int, record_id: str, caption: tuple[int, bool] | None = None
    ) -> RecordRandom | None:
        """Returns the random draws for a record in an epoch; None in evaluation."""
        spec = self.spec
        if not spec.training:
            return None
        return RecordRandom(spec.seed, epoch, record_id, caption, dataset=spec.name)

    def require_whole(self, place: int, record: Record) -> None:
        """Raises DamagedError for a record that is damaged, or was when it was measured."""
        if record.damaged or self.plans.was_damaged(place):
            raise DamagedError

    def require_length(
        self, place: int, record: Record, tokens: int, caption: tuple[int, bool] | None
    ) -> None:
        """Raises UserError where a record's length differs from the measured one, for which
        its row was planned.
        """
        measured, dataset = self.plans.length(place, caption), self.spec.dataset
        if measured is None:
            return
        if dataset.kind in ("pairs", "videos"):
            measured = min(measured, dataset.max_length)
        # A question may be shorter: the longest of its answers was measured.
        if tokens > measured or (tokens < measured and dataset.kind != "questions"):
            raise self.changed(record, f"{tokens} tokens, where {measured} were measured")

    def changed(self, record: Record, what: str) -> UserError:
        """Makes the error for a record that has changed since it was measured."""
        return UserError(
            f"the record {record.id!r} of the dataset {self.spec.shown_name} has {what}: its files"
            " were changed since; remove the files lengths_* that lie beside them and start again"
        )

    def assemble(self, rows: Sequence[Sequence[Segment]]) -> Arrays:
        """Concatenates rows' segments into the token arrays that the task takes."""
        spec = self.spec
        arrays = assemble(rows, length=spec.dataset.max_length, pad_token=spec.tokenizer.pad)
        if spec.task == "language_modelling":
            del arrays["media_index"]
        return arrays
