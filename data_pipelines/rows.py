"""Reads rows of a dataset as arrays, by their index in the endless stream of all epochs."""

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
    """Reads any row of any epoch by its index in the endless stream of rows: the first row of
    the second epoch is row `len(reader)`. Thread-safe.
    """

    def __init__(self, spec: RowSpec, source: Sequence[Any] | None, cache_bytes: int):
        """Opens the dataset, measures its records and plans the first epoch.

        Args:
          source: records to use instead of those at the dataset's path.
          cache_bytes: memory budget for records with decoded images.

        Raises: UserError where the split is empty, or nothing in it fits a row.
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
        """Returns the number of rows in an epoch, the same in each."""
        return len(self._plans)

    def batch(
        self,
        first: int,
        size: int,
        host_shard: HostShard = WHOLE_BATCH,
        readers: Readers | None = None,
        order: float = 0,
    ) -> PendingBatch:
        """Begins a host's shard of the global batch of rows first..first + size.

        Held-out data has one pass alone: rows past its end are padding.

        Args:
          readers: the threads that make it; None to make it in the thread that calls `result`.
          order: its priority among the readers' batches, lower first.
        """
        return PendingBatch(
            lambda batch: self._begin(batch, first, size, host_shard), readers, order
        )

    def _begin(
        self, batch: PendingBatch, first: int, size: int, host_shard: HostShard
    ) -> Callable[[], Arrays]:
        """Adds the batch's tasks, one per row or image; returns what finishes the batch."""
        contrastive = self._spec.task == "contrastive"
        if contrastive:
            # A run resumed with another batch size may start within a batch. Round up: a batch
            # that mixes two epochs could hold a pair twice, each the other's negative.
            first = -(-first // size) * size
        rows = [self._plans.row(place) for place in (first + host_shard.rows(size)).tolist()]
        if contrastive:
            return self._contrastive_rows.begin(batch, rows)
        if not self._spec.shows_visuals:
            return self._text_rows.begin(batch, rows)
        layout = VisualLayout.of(host_shard, size, self._spec.dataset.visuals)
        return self._visual_rows.begin(batch, rows, layout)

    def _load_features(self, opened: Sequence[Any], encoder: Encoder) -> CachedFeatures:
        """Loads the encoder's cached features, encoding what is missing."""
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
        """Counts the dataset's records and rows, and what was left out or cut.

        Returns:
          records: records in the split. rows: rows in an epoch.
          fill: fraction of the first epoch's tokens that is not padding; None for contrastive.
          cut: records longer than a row, of which a window, several pieces or a truncated
            caption is used (contrastive captions are counted as they are read).
          too_long: items that fit no row.
          dropped: items left out of the newest epoch to keep the number of rows.
          failed: ids of the records whose images could not be read so far.
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
