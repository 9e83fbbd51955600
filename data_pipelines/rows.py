"""Reads the rows of a dataset as arrays, each by its place in the endless stream of rows."""

from collections.abc import Callable, Sequence
from typing import Any

from data_pipelines.contrastive_rows import ContrastiveRows
from data_pipelines.feature_cache import CachedFeatures, Encoder, load_or_encode
from data_pipelines.features import dataset_folder
from data_pipelines.readers import PendingBatch, Readers
from data_pipelines.records import IMAGE_FEATURES, Failures, RecordCache, open_records
from data_pipelines.row_context import RowContext
from data_pipelines.row_plans import RowPlans, RowSpec
from data_pipelines.text_rows import TextRows
from data_pipelines.transforms.buffers import BufferPool
from data_pipelines.transforms.examples import Arrays
from data_pipelines.transforms.visual_buffer import feature_format, image_format
from data_pipelines.visual_rows import VisualLayout, VisualRows
from flamingo_jax.errors import UserError
from flamingo_jax.partitioning.host_shard import WHOLE_BATCH, HostShard


class RowReader:
    """Reads every row of every epoch by its place in the endless stream of rows.

    Safe to use from several threads.
    """

    def __init__(self, spec: RowSpec, source: Sequence[Any] | None, cache_bytes: int):
        """source: records in place of those at the dataset's path; cache_bytes: records stay in
        memory until these are used.

        Raises UserError where the split is empty, or nothing in it fits a row.
        """
        self._spec, dataset = spec, spec.dataset
        self.name = spec.shown_name
        stored = source is None
        opened = (
            source
            if source is not None
            else open_records(dataset.path, dataset.split, dataset.kind)
        )
        if not len(opened):
            raise UserError(
                f"the split {dataset.split!r} of the dataset {self.name} is empty; name another"
                " split"
            )
        records = RecordCache(
            opened,
            dataset.kind,
            spec.image_size,
            spec.image_fit,
            cache_bytes=cache_bytes,
            with_images=spec.shows_visuals and spec.encoder is None,
        )
        self._failures = Failures(self.name, len(opened))
        self._plans = RowPlans(spec, opened, stored=stored)
        context = RowContext(spec, records, self._plans, self._failures)
        frame_format, pool = image_format(spec.image_size, spec.mean), BufferPool()
        features: CachedFeatures | None = None
        if spec.encoder is not None and spec.shows_visuals:
            features = self._load_features(opened, spec.encoder)
            frame_format = feature_format(features.shape, features.dtype)
        self._text_rows = TextRows(context)
        self._visual_rows = VisualRows(context, frame_format, pool, features)
        self._contrastive_rows = ContrastiveRows(context, frame_format, pool)
        self._records = len(opened)

    def __len__(self) -> int:
        """Rows in an epoch, the same in every epoch."""
        return len(self._plans)

    def batch(
        self,
        first: int,
        size: int,
        host_shard: HostShard = WHOLE_BATCH,
        readers: Readers | None = None,
        order: float = 0,
    ) -> PendingBatch:
        """A host's share of the global batch of the `size` rows from `first` on; those past the
        only pass over fixed rows are padding.

        readers: what makes it, in this order among their batches; None leaves that to whoever
          asks for the result.
        """
        return PendingBatch(
            lambda batch: self._begin(batch, first, size, host_shard), readers, order
        )

    def _begin(
        self, batch: PendingBatch, first: int, size: int, host_shard: HostShard
    ) -> Callable[[], Arrays]:
        """Adds the batch's work, a row's or an image's at a time; returns what finishes it."""
        contrastive = self._spec.task == "contrastive"
        if contrastive:
            # Where another batch size left off in the midst of one: no batch holds rows of two
            # epochs.
            first = -(-first // size) * size
        rows = [self._plans.row(place) for place in (first + host_shard.rows(size)).tolist()]
        if contrastive:
            return self._contrastive_rows.begin(batch, rows)
        if not self._spec.shows_visuals:
            return self._text_rows.begin(batch, rows)
        layout = VisualLayout.of(host_shard, size, self._spec.dataset.visuals)
        return self._visual_rows.begin(batch, rows, layout)

    def _load_features(self, opened: Sequence[Any], encoder: Encoder) -> CachedFeatures:
        spec, dataset = self._spec, self._spec.dataset
        if dataset.flip or dataset.colour:
            raise UserError(
                f"the dataset {self.name} is augmented, so its features cannot be kept: set its"
                " flip and colour to 0, or training.cache_features off"
            )
        index, count = spec.process
        return load_or_encode(
            opened,
            IMAGE_FEATURES[dataset.kind],
            encoder,
            dataset_folder(dataset.path),
            dataset.split,
            image_size=spec.image_size,
            mean=spec.mean,
            image_fit=spec.image_fit,
            index=index,
            count=count,
        )

    def summary(self) -> dict[str, Any]:
        """What became of the dataset.

        records, rows (in an epoch), fill (part of the first epoch's tokens that is no padding,
        None for contrastive pairs); cut: records longer than a row, which give a window, a
        caption without its end, or several pieces, and contrastive pairs whose caption was cut
        so far; too_long: items that fit no row; dropped: items that the newest epoch leaves out
        for an equal number of rows; failed: ids of records whose images could not be read so
        far.
        """
        plans = self._plans
        return {
            "records": self._records,
            "rows": len(self),
            "fill": None if self._spec.task == "contrastive" else plans.first.fill,
            "cut": int(plans.cut.sum()),
            "too_long": plans.first.too_long,
            "dropped": plans.dropped,
            "failed": sorted(self._failures.failed),
        }
