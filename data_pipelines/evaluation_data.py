"""Reads prepared TFDS datasets for evaluation: the `DatasetReader` that
`flamingo_jax.evaluation.datasets` declares, since the library itself does not import TFDS.
"""

import pathlib
from collections.abc import Collection, Sequence
from typing import Any

from data_pipelines.features import dataset_folder, kind_of
from data_pipelines.records import open_records


class PreparedDatasets:
    """Opens datasets that `launch.build_data` wrote, by their folder's path relative to
    `root`.
    """

    def __init__(self, root: str | pathlib.Path = ""):
        self._root = pathlib.Path(root)

    def kind(self, path: str) -> str:
        """Returns the dataset's kind: pages, pairs, videos, questions or text.

        Raises: UserError where there is no dataset, or its features are of no known kind.
        """
        return kind_of(self._info(path).features)

    def splits(self, path: str) -> Collection[str]:
        """Returns the names of a dataset's splits."""
        return list(self._info(path).splits)

    def records(self, path: str, split: str, kind: str) -> Sequence[Any]:
        """Opens a split for random access; records are read and decoded when indexed.

        Raises: UserError where the split does not exist or its records are not of `kind`.
        """
        return open_records(self._root / path, split, kind)

    def _info(self, path: str) -> Any:
        # Imported here because TFDS takes seconds to import.
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(str(dataset_folder(self._root / path))).info
