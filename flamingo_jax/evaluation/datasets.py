"""The interface through which evaluation reads datasets. `data_pipelines.evaluation_data`
implements it for TFDS; the library itself does not depend on TFDS.
"""

from collections.abc import Collection, Sequence
from typing import Any, Protocol


class DrawnRecords(Sequence[Any]):
    """Some of a split's records, read when they are indexed.

    places: of the records among all of the split.
    """

    def __init__(self, records: Sequence[Any], places: Sequence[int]):
        self._records, self._places = records, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        return self._records[self._places[place]]


class DatasetReader(Protocol):
    """Reads datasets by the path of their folder."""

    def kind(self, path: str) -> str:
        """Returns the dataset's kind: pairs, videos, questions, pages or text.

        Raises: UserError where there is no dataset.
        """

    def splits(self, path: str) -> Collection[str]:
        """Returns the names of a dataset's splits."""

    def records(self, path: str, split: str, kind: str) -> Sequence[Any]:
        """Opens a split's records for random access; a record is read when it is indexed.

        Raises: UserError where there is no such split, or its records are not of `kind`.
        """
