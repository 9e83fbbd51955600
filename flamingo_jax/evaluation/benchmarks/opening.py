"""Opens a benchmark's official files for a run: draws the queries and the support set, and
counts missing images.
"""

import dataclasses
import pathlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import (
    NO_SUPPORT,
    BenchmarkSet,
    SplitContent,
)
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.media import ClipFile, ImageFile
from flamingo_jax.evaluation.protocol.classification import Classification
from flamingo_jax.evaluation.protocol.open_ended import OpenEnded
from flamingo_jax.evaluation.scoring import files
from flamingo_jax.evaluation.scoring.predictions import check_scorer
from flamingo_jax.evaluation.selection.shots import draw

MissingMedia = Literal["error", "skip"]
"""What is done about a query or support example whose image is not there."""


@dataclasses.dataclass(frozen=True)
class OpenedBenchmark:
    """A benchmark with its queries and support set.

    asked: asks a model.
    split, support_split: names of the splits.
    references: {annotation file: SHA-256}.
    missing: {"queries", "support"}: ids of examples that were left out because their image is
      not there.
    """

    benchmark: BenchmarkSet
    asked: OpenEnded | Classification
    split: str
    support_split: str
    references: Mapping[str, str]
    missing: Mapping[str, Sequence[str]]


def open_benchmark(
    benchmark: BenchmarkSet,
    folder: pathlib.Path,
    *,
    split: str = "",
    support_split: str = "",
    limit: int = 0,
    support_limit: int = 2048,
    seed: int = 0,
    missing_media: MissingMedia = "error",
    wordnet: str = "",
) -> OpenedBenchmark:
    """Reads a benchmark's annotations, and draws its queries and support set.

    Args:
      split, support_split: by default those of the paper.
      limit, support_limit: the most queries and support examples, drawn by `seed`; 0 for all.
      missing_media: "skip" leaves examples without their image out, and counts them.
      wordnet: folder of WordNet 3.0's files, where the metric reads them; by default one that is
        found.

    Raises: UserError for a missing or malformed file, an unknown split, or a missing image, and
      where the metric's files are not there.
    """
    check_scorer(benchmark.scorer, wordnet=wordnet)
    split, support_split = split or benchmark.splits[0], support_split or benchmark.support
    contents: dict[str, SplitContent] = {}
    for name in dict.fromkeys((split, support_split)):
        if name == NO_SUPPORT:
            contents[name] = SplitContent([], [])
            continue
        if name not in benchmark.splits:
            raise UserError(
                f"{benchmark.name} has no split {name!r}: name one of {', '.join(benchmark.splits)}"
            )
        contents[name] = benchmark.read(folder, name)
    present, missing = {}, {}
    for name, content in contents.items():
        present[name] = [one for one in content.examples if _there(one)]
        missing[name] = [one.id for one in content.examples if not _there(one)]
        if missing[name] and missing_media == "error":
            first = next(one.media for one in content.examples if not _there(one))
            raise UserError(
                f"{len(missing[name]):,} of {len(content.examples):,} images or videos of"
                f" {benchmark.name}'s split {name} are not there, such as {_path(first)}: add them,"
                " or go on without them by --missing_media=skip"
            )
    queries = _drawn(present[split], f"{benchmark.name}:{split}", limit, seed)
    support = _support(benchmark, present[support_split], support_split, support_limit, seed)
    common: dict[str, Any] = {
        "name": benchmark.name,
        "queries": queries,
        "support": support,
        "template": benchmark.template,
    }
    if benchmark.kind == "generate":
        asked: OpenEnded | Classification = OpenEnded(**common, metric=None)
    else:
        asked = Classification(**common, classes=contents[split].classes, scored=False)
    return OpenedBenchmark(
        benchmark,
        asked,
        split,
        support_split,
        {path.name: files.digest(str(path)) for path in contents[split].files},
        {"queries": missing[split], "support": missing[support_split]},
    )


def _support(
    benchmark: BenchmarkSet, examples: list[BenchmarkExample], split: str, limit: int, seed: int
) -> list[BenchmarkExample]:
    """Draws the support set, with at most `per_class` examples of each class, of the examples
    that have an answer to show.
    """
    examples = [one for one in examples if one.answers and one.answers[0].strip()]
    if benchmark.per_class:
        by_class: dict[str, list[BenchmarkExample]] = defaultdict(list)
        for one in examples:
            by_class[one.answers[0]].append(one)
        return [
            one
            for name, some in by_class.items()
            for one in _drawn(some, f"{benchmark.name}:{split}:{name}", benchmark.per_class, seed)
        ]
    return _drawn(examples, f"{benchmark.name}:{split}", limit, seed)


def _drawn(
    examples: list[BenchmarkExample], name: str, limit: int, seed: int
) -> list[BenchmarkExample]:
    return [examples[place] for place in draw(seed, name, len(examples), limit)]


def _there(example: BenchmarkExample) -> bool:
    """Returns whether the image or video of an example and of its own shots is there."""
    own = [example.media, *(shot.media for shot in example.context or ())]
    return all(getattr(one, "there", True) for one in own)


def _path(media: object) -> pathlib.Path | str:
    return media.path if isinstance(media, ImageFile | ClipFile) else ""
