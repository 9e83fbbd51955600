"""Builds everything the quickstart trains and is tested on: the synthetic world's datasets and its
tokenizer.
"""

import itertools
import pathlib
from concurrent.futures import Executor
from typing import Any

from data_pipelines import quickstart
from data_pipelines.build.sentencepiece_trainer import texts_in, train_tokenizer
from data_pipelines.build.world import WorldSource
from data_pipelines.build.writer import write_dataset
from flamingo_jax.processing.tokenizer import FILE_NAME

TRAINED_ON = tuple(
    name for name, dataset in quickstart.DATASETS.items() if "train" in dataset.sizes
)
VOCABULARY = 384
OPENINGS = 500


def build_quickstart(
    output: str | pathlib.Path,
    *,
    seed: int = 0,
    executor: Executor | None = None,
    limit: int | None = None,
) -> dict[str, tuple[dict[str, Any], bool]]:
    """Every dataset of the world at `output/<name>`, and the tokenizer at `output/tokenizer`.

    Returns each dataset's statistics and whether it was built now. `limit` bounds the records
    of every split, for tests.
    """
    output = pathlib.Path(output)
    made = {
        name: write_dataset(output / name, WorldSource(name, seed, limit), executor)
        for name in quickstart.DATASETS
    }
    if not (output / "tokenizer" / FILE_NAME).exists():
        texts = itertools.chain.from_iterable(texts_in(output / name) for name in TRAINED_ON)
        # Captions begin with any of these words, some so rarely that they would not become one
        # piece each.
        openings = itertools.chain.from_iterable(
            itertools.repeat(word, OPENINGS) for word in (*quickstart.COLOURS, *quickstart.SHAPES)
        )
        texts = itertools.chain(texts, openings)
        train_tokenizer(texts, output / "tokenizer", vocab_size=VOCABULARY, byte_fallback=False)
    return made
