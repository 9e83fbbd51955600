"""Prepared datasets as evaluation reads them (`flamingo_jax.evaluation.datasets`)."""

import pathlib
from collections.abc import Collection, Sequence
from typing import Any

from data_pipelines.features import dataset_folder, kind_of
from data_pipelines.records import open_records


class PreparedDatasets:
    """Datasets of `launch.build_data`, by the path of their folder below `root`."""

    def __init__(self, root: str | pathlib.Path = ""):
        self._root = pathlib.Path(root)

    def kind(self, path: str) -> str:
        """Returns what a dataset holds, by its features; raises UserError where there is none."""
        return kind_of(self._info(path).features)

    def splits(self, path: str) -> Collection[str]:
        """Returns the names of a dataset's splits."""
        return list(self._info(path).splits)

    def records(self, path: str, split: str, kind: str) -> Sequence[Any]:
        """Opens a split; raises UserError where it is not there or holds something else."""
        return open_records(self._root / path, split, kind)

    def _info(self, path: str) -> Any:
        # Here, since it takes seconds to import.
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(str(dataset_folder(self._root / path))).info
