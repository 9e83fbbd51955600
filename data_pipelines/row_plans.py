"""Which examples stand in each row of a dataset: a pure function of the row's place in the endless
stream of rows.
"""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from data_pipelines.feature_cache import Encoder
from data_pipelines.features import dataset_folder
from data_pipelines.row_items import RowItems
from data_pipelines.transforms.lengths import CaptionChoices, Lengths, load_or_measure, measure
from data_pipelines.transforms.packing import PackingPlan, plan_rows
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import DatasetConfig
from flamingo_jax.processing.images import Fit
from flamingo_jax.processing.sequences import pair_overhead
from flamingo_jax.processing.tokenizer import Tokenizer

TaskName = Literal["contrastive", "language_modelling", "flamingo"]
TASK_KINDS: dict[str, tuple[str, ...]] = {
    "contrastive": ("pairs", "questions"),
    "language_modelling": ("text", "questions"),
    "flamingo": ("pages", "pairs", "videos", "text", "questions"),
}
"""The kinds of dataset that each task can read."""


@dataclasses.dataclass(frozen=True)
class RowSpec:
    """What rows are made from and for.

    training: False draws nothing at random, so that every visit of a record is the same.
    encoder: rows hold its features in place of images. process: this one and how many there are;
    each encodes its share. name: the dataset's in the config, part of the key of all that is
    drawn at random for it.
    """

    dataset: DatasetConfig
    task: TaskName
    tokenizer: Tokenizer
    image_size: int
    mean: tuple[float, ...]
    text_length: int
    seed: int
    training: bool
    encoder: Encoder | None = None
    process: tuple[int, int] = (0, 1)
    name: str = ""
    image_fit: Fit = "pad"

    def __post_init__(self) -> None:
        """Raises UserError for a dataset that the task cannot read."""
        dataset = self.dataset
        if dataset.kind not in TASK_KINDS[self.task]:
            kinds = " or ".join(TASK_KINDS[self.task])
            raise UserError(
                f"the {self.task} task reads datasets of kind {kinds}, and {dataset.path!r} is of"
                f" kind {dataset.kind}; take it out"
            )
        if dataset.kind == "questions" and "{question}" not in dataset.prompt:
            raise UserError(
                f"the prompt {dataset.prompt!r} of the dataset {self.shown_name} has no"
                " {question} in it, so that nothing would be asked; write it in"
            )

    @property
    def shown_name(self) -> str:
        """The dataset's name in messages."""
        return self.dataset.path or self.dataset.kind

    @property
    def shows_visuals(self) -> bool:
        """Whether rows show images at all; otherwise they are texts."""
        return self.task != "language_modelling" and self.dataset.kind != "text"


class PlannedRow(NamedTuple):
    """The items of a row, the epoch it stands in, and the captions that were chosen for that
    epoch.
    """

    items: np.ndarray
    epoch: int
    choices: CaptionChoices | None


class RowPlans:
    """Plans the rows of every epoch. Safe to use from several threads.

    items: what rows are planned from. measured: the lengths of all records, None where they are
    not needed. cut: bool [records], those longer than a row. dropped: items that the newest
    epoch leaves out for an equal number of rows.
    """

    def __init__(self, spec: RowSpec, records: Sequence[Any], *, stored: bool):
        """records: of the dataset. stored: they are those at its path, where their lengths are
        kept.

        Raises UserError where nothing fits a row.
        """
        self._spec = spec
        self.measured: Lengths | None = None
        self.cut = np.zeros(len(records), bool)
        self.items = self._make_items(records, stored)
        self.dropped = 0
        self._lock = threading.Lock()
        self._plans: dict[int, tuple[PackingPlan, CaptionChoices | None]] = {}
        self._count = self._whole_batches()
        self.first, _ = self._plan(0)
        self._count = len(self.first)
        if not self._count:
            dataset = spec.dataset
            raise UserError(
                f"nothing in the dataset {spec.shown_name} fits a row of {dataset.max_length}"
                f" tokens and {dataset.visuals} visuals; raise its `max_length` or `visuals`"
            )

    def __len__(self) -> int:
        """Rows in an epoch, the same in every epoch."""
        return self._count or 0

    def row(self, place: int) -> PlannedRow:
        """Returns the row at a place of the endless stream; an empty one past the only pass over
        fixed rows.
        """
        if not self._spec.training and place >= len(self):
            return PlannedRow(np.zeros(0, np.int32), 0, None)
        epoch, within = divmod(place, len(self))
        planned, choices = self._plan(epoch)
        return PlannedRow(planned.row(within), epoch, choices)

    def records(self, item: int) -> range:
        """Places in the dataset of an item's records."""
        first = int(self.items.record[item])
        return range(first, first + int(self.items.count[item]))

    def records_in(self, rows: Sequence[PlannedRow]) -> int:
        """Counts the records of the rows."""
        return sum(int(self.items.count[row.items].sum()) for row in rows)

    def was_damaged(self, place: int) -> bool:
        """Whether a record's bytes were damaged when it was measured: its place in a row is a
        blank one's.
        """
        return self.measured is not None and bool(self.measured.damaged[place])

    def length(self, place: int, caption: tuple[int, bool] | None) -> int | None:
        """Tokens of a record's sequence as measured, with the caption that was chosen; None where
        nothing was.
        """
        return None if self.measured is None else self.measured.of_record(place, caption)

    def _whole_batches(self) -> int | None:
        """Rows of an epoch of contrastive training, None for any that the first plan gives.

        Only whole batches: in one of two epochs a pair could stand twice, each the other's
        negative. What is left over is another pair in each epoch.
        """
        if self._spec.task != "contrastive" or not self._spec.training:
            return None
        items, size = len(self.items.record), self._spec.dataset.batch_size
        return items - items % size if items >= size else None

    def _make_items(self, records: Sequence[Any], stored: bool) -> RowItems:
        spec, dataset = self._spec, self._spec.dataset
        contrastive = spec.task == "contrastive"
        if contrastive and dataset.kind == "pairs":
            return RowItems.one_each(len(records))
        if stored:
            folder = dataset_folder(dataset.path)
            lengths = load_or_measure(
                records, dataset.kind, spec.tokenizer, folder, dataset.split, dataset.prompt
            )
        else:
            lengths = measure(records, dataset.kind, spec.tokenizer, dataset.prompt)
        if dataset.kind != "questions":
            self.cut = lengths.tokens > dataset.max_length
        self.measured = lengths
        if (
            dataset.kind in ("pairs", "videos")
            and dataset.max_length < pair_overhead(spec.tokenizer) + 1
        ):
            raise UserError(
                f"rows of {dataset.max_length} tokens have no room for a caption in the dataset"
                f" {spec.shown_name}; raise its `max_length`"
            )
        if contrastive:
            return RowItems.by_visual(lengths)
        if spec.shows_visuals:
            return RowItems.of(lengths, dataset)
        # As texts, questions share nothing.
        items = RowItems.of(dataclasses.replace(lengths, same=np.zeros_like(lengths.same)), dataset)
        return dataclasses.replace(items, visuals=np.zeros_like(items.visuals))

    def _choose_captions(self, epoch: int) -> CaptionChoices | None:
        """Captions are chosen before rows are planned: a row planned for the longest of several
        would be a third empty.
        """
        spec = self._spec
        if self.measured is None or not len(self.measured.captions):
            return None
        if not spec.training:
            return self.measured.first_captions()
        return self.measured.choose(spec.dataset.leading_space, spec.seed, epoch, spec.name)

    def _plan(self, epoch: int) -> tuple[PackingPlan, CaptionChoices | None]:
        with self._lock:
            if epoch not in self._plans:
                # Threads read ahead over the end of an epoch, so two plans are alive at a time.
                for old in sorted(self._plans)[:-1]:
                    del self._plans[old]
                self._plans[epoch] = self._make_plan(epoch)
                self.dropped = self._plans[epoch][0].dropped
            return self._plans[epoch]

    def _make_plan(self, epoch: int) -> tuple[PackingPlan, CaptionChoices | None]:
        spec, dataset = self._spec, self._spec.dataset
        choices = self._choose_captions(epoch)
        lengths = self.items.length
        if choices is not None and self.measured is not None:
            lengths = np.minimum(self.measured.of(choices), dataset.max_length)
        plan = plan_rows(
            lengths,
            self.items.visuals,
            row_length=dataset.max_length,
            row_visuals=dataset.visuals,
            seed=spec.seed,
            epoch=epoch,
            dataset=spec.name,
            rows=self._count,
            pack=dataset.pack and spec.task != "contrastive",
        )
        return plan, choices
