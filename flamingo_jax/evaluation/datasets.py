"""How evaluation reads datasets, whatever wrote them: `data_pipelines.evaluation_data` reads
those of TFDS.
"""

from collections.abc import Collection, Sequence
from typing import Any, Protocol


class DatasetReader(Protocol):
    """Datasets by the path of their folder."""

    def kind(self, path: str) -> str:
        """Returns what a dataset holds: pairs, videos, questions, pages or text.

        Raises: UserError where there is no dataset.
        """

    def splits(self, path: str) -> Collection[str]:
        """Returns the names of a dataset's splits."""

    def records(self, path: str, split: str, kind: str) -> Sequence[Any]:
        """Opens a split's records, which are read as they are asked for.

        Raises: UserError where there is no such split, or it holds something else than `kind`.
        """
