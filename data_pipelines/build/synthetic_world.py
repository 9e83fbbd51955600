"""Source `quickstart`: builds the synthetic world's datasets and tokenizer, on which the
quickstart trains and is evaluated.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

from data_pipelines.build.sentencepiece_trainer import texts_in, train_tokenizer
from data_pipelines.build.source import Converted, SplitRecord
from data_pipelines.build.writer import write_dataset
from data_pipelines.synthetic_world.datasets import DATASETS, make_record
from data_pipelines.synthetic_world.scenes import COLOURS, SHAPES
from flamingo_jax.processing.tokenizer import FILE_NAME

TRAINED_ON = tuple(name for name, dataset in DATASETS.items() if "train" in dataset.sizes)
VOCABULARY = 384
OPENINGS = 500
"""How often each colour and shape is added on its own to the text that the tokenizer is
trained on.

Captions may begin with any of these words, some so rarely that the tokenizer would split them.
"""


@dataclasses.dataclass(frozen=True)
class WorldSource:
    """Generates the records of one dataset of the synthetic world.

    limit: the most records of each split, for tests; None for all.
    """

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
        """None: every record names its split."""
        return None

    def entries(self) -> Sequence[tuple[str, int]]:
        """Lists the records to generate as (split, index)."""
        sizes = DATASETS[self.dataset].sizes
        return [
            (split, index)
            for split, size in sizes.items()
            for index in range(size if self.limit is None else min(size, self.limit))
        ]

    def convert(self, entry: tuple[str, int]) -> list[Converted]:
        """Generates one record, a pure function of (dataset, split, index, seed)."""
        split, index = entry
        return [SplitRecord(split, make_record(self.dataset, split, index, self.seed).record)]


def build_quickstart(
    output: str | pathlib.Path,
    *,
    seed: int = 0,
    executor: Executor | None = None,
    limit: int | None = None,
) -> dict[str, tuple[dict[str, Any], bool]]:
    """Builds every dataset of the world at `output/<name>` and the tokenizer at
    `output/tokenizer`.

    Args:
      executor: a pool of processes that makes the records.
      limit: the most records of each split, for tests; None for all.

    Returns: {dataset: (its statistics, whether it was built by this call)}.
    """
    output = pathlib.Path(output)
    made = {
        name: write_dataset(output / name, WorldSource(name, seed, limit), executor)
        for name in DATASETS
    }
    if not (output / "tokenizer" / FILE_NAME).exists():
        texts = itertools.chain.from_iterable(texts_in(output / name) for name in TRAINED_ON)
        openings = itertools.chain.from_iterable(
            itertools.repeat(word, OPENINGS) for word in (*COLOURS, *SHAPES)
        )
        texts = itertools.chain(texts, openings)
        train_tokenizer(texts, output / "tokenizer", vocab_size=VOCABULARY, byte_fallback=False)
    return made
