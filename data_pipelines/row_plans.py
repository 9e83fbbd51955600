"""Plans which examples each row of a dataset holds: a pure function of the seed and the row's
index in the endless stream of rows, computed without reading the examples.
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
"""Task -> the kinds of dataset that it can read."""


@dataclasses.dataclass(frozen=True)
class RowSpec:
    """How the rows of a dataset are made.

    mean: the colour, 0..1 per channel, that pads images to squares.
    text_length: tokens of a text in contrastive training.
    training: False for evaluation, without augmentation and other random choices.
    encoder: put this frozen encoder's cached features into rows instead of images.
    process: (index, count) of processes; each encodes its part of missing features.
    name: the dataset's in the config, part of the key of its random draws.
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
        """Returns the dataset's name in messages."""
        return self.dataset.path or self.dataset.kind

    @property
    def shows_visuals(self) -> bool:
        """Returns whether rows have images; otherwise they are text alone."""
        return self.task != "language_modelling" and self.dataset.kind != "text"


class PlannedRow(NamedTuple):
    """One row.

    items: int32 [n], indices into `RowPlans.items`.
    epoch: the row's epoch.
    choices: the caption of every record in that epoch; None where there are no captions.
    """

    items: np.ndarray
    epoch: int
    choices: CaptionChoices | None


class RowPlans:
    """Plans the rows of each epoch. Thread-safe.

    items: the items that are packed.
    measured: the lengths of all records; None where they are not needed.
    cut: bool [records], True where a record is longer than a row.
    dropped: how many items the newest epoch leaves out to keep the number of rows.
    """

    def __init__(self, spec: RowSpec, records: Sequence[Any], *, stored: bool):
        """Measures the records and plans the first epoch, which fixes the number of rows.

        stored: the records are those at the dataset's path, so their lengths are saved there.

        Raises: UserError where nothing fits a row.
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
        """Returns the number of rows in an epoch, the same in each."""
        return self._count or 0

    def row(self, place: int) -> PlannedRow:
        """Returns a row of the endless stream; held-out data has one pass, then empty rows."""
        if not self._spec.training and place >= len(self):
            return PlannedRow(np.zeros(0, np.int32), 0, None)
        epoch, within = divmod(place, len(self))
        planned, choices = self._plan(epoch)
        return PlannedRow(planned.row(within), epoch, choices)

    def records(self, item: int) -> range:
        """Returns the indices of an item's records."""
        first = int(self.items.record[item])
        return range(first, first + int(self.items.count[item]))

    def records_in(self, rows: Sequence[PlannedRow]) -> int:
        """Counts the records in rows."""
        return sum(int(self.items.count[row.items].sum()) for row in rows)

    def was_damaged(self, place: int) -> bool:
        """Returns whether a record was damaged when it was measured: its row was then planned
        for a blank record.
        """
        return self.measured is not None and bool(self.measured.damaged[place])

    def length(self, place: int, caption: tuple[int, bool] | None) -> int | None:
        """Returns the measured tokens of a record's sequence with the chosen caption; None
        where nothing was measured.
        """
        return None if self.measured is None else self.measured.of_record(place, caption)

    def _whole_batches(self) -> int | None:
        """Returns the rows of a contrastive epoch, a multiple of the batch size; None for
        other tasks, where the first plan decides.

        In a batch that spans two epochs a pair could occur twice, each the other's negative.
        The pairs left over differ between epochs.
        """
        if self._spec.task != "contrastive" or not self._spec.training:
            return None
        items, size = len(self.items.record), self._spec.dataset.batch_size
        return items - items % size if items >= size else None

    def _make_items(self, records: Sequence[Any], stored: bool) -> RowItems:
        """Measures the records, if rows need their lengths, and makes items of them."""
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
        # In language modelling there is no visual to share: each question is its own item.
        items = RowItems.of(dataclasses.replace(lengths, same=np.zeros_like(lengths.same)), dataset)
        return dataclasses.replace(items, visuals=np.zeros_like(items.visuals))

    def _choose_captions(self, epoch: int) -> CaptionChoices | None:
        """Chooses each record's caption for an epoch, before rows are packed: packed by their
        longest caption, rows would be a third empty.
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
                # Keep two plans: threads that read ahead are already in the next epoch.
                for old in sorted(self._plans)[:-1]:
                    del self._plans[old]
                self._plans[epoch] = self._make_plan(epoch)
                self.dropped = self._plans[epoch][0].dropped
            return self._plans[epoch]

    def _make_plan(self, epoch: int) -> tuple[PackingPlan, CaptionChoices | None]:
        """Chooses an epoch's captions and packs its rows."""
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
