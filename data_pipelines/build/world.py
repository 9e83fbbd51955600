"""The embedded synthetic world as a source, one per dataset."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from data_pipelines.build.source import Converted, SplitRecord
from data_pipelines.quickstart import DATASETS, make_record


@dataclasses.dataclass(frozen=True)
class WorldSource:
    """`dataset` is a key of `quickstart.DATASETS`; `limit` bounds every split, for tests."""

    dataset: str
    seed: int = 0
    limit: int | None = None

    @property
    def kind(self) -> str:
        return DATASETS[self.dataset].kind

    @property
    def about(self) -> str:
        return f"The synthetic world: {DATASETS[self.dataset].about}."

    @property
    def options(self) -> dict[str, Any]:
        return {"source": "quickstart", **dataclasses.asdict(self)}

    @property
    def shares(self) -> None:
        return None

    def entries(self) -> Sequence[tuple[str, int]]:
        sizes = DATASETS[self.dataset].sizes
        return [
            (split, index)
            for split, size in sizes.items()
            for index in range(size if self.limit is None else min(size, self.limit))
        ]

    def convert(self, entry: tuple[str, int]) -> list[Converted]:
        split, index = entry
        return [SplitRecord(split, make_record(self.dataset, split, index, self.seed).record)]
