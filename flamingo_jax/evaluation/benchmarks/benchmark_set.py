"""What a benchmark's file says: where its official files are read from, its splits, prompt,
decoding and metric.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.prompts import PromptTemplate

PAPER_SHOTS = (0, 4, 8, 16, 32)
NO_SUPPORT = "none"
"""The support split where there are no examples to choose shots from: every benchmark has it."""


class SplitContent(NamedTuple):
    """What the official files say of a split.

    examples: in the files' order; their images and clips are not read.
    files: the annotations that were read, which identify the references.
    classes: all class names, where queries have the same candidates; else ().
    """

    examples: list[BenchmarkExample]
    files: Sequence[pathlib.Path]
    classes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class BenchmarkSet:
    """A benchmark in its official files.

    name: in flags and results, such as "coco".
    title: in reports, such as "COCO captions".
    layout: what lies where in the benchmark's folder, for --help and errors: {path: what it is}.
    kind: whether answers are generated, or candidates are ranked by log-likelihood.
    template: the prompt of an example.
    scorer: name of the metric of all predictions (`scoring.predictions.SCORERS`).
    read: (folder, split) -> its content; raises UserError that names the file that is missing or
      malformed.
    splits: names of the splits; the first has the queries, by default.
    support: the split that shots are chosen from, by default; `NO_SUPPORT` where a benchmark is
      zero-shot, or gives each query its own shots.
    scorer_options: of the metric.
    max_tokens: of a generated answer at most.
    shots: the numbers of shots that the paper reports.
    video: whether its visuals are clips: 30 frames at 3 a second (paper 3.2).
    per_class: the most support examples of each class; 0 for a limit on their sum alone.
    text_examples: of zero-shot prompts; None for two where answers are generated, none where
      candidates are ranked (paper 3.1).
    submission: name of the form in which the owners score predictions
      (`scoring.submission.FORMS`); "" for none.
    """

    name: str
    title: str
    layout: Mapping[str, str]
    kind: Literal["generate", "rank"]
    template: PromptTemplate
    scorer: str
    read: Callable[[pathlib.Path, str], SplitContent]
    splits: Sequence[str]
    support: str
    scorer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_tokens: int = 24
    shots: Sequence[int] = PAPER_SHOTS
    video: bool = False
    per_class: int = 0
    text_examples: int | None = None
    submission: str = ""

    def __post_init__(self) -> None:
        if self.support not in (*self.splits, NO_SUPPORT):
            raise ValueError(f"{self.name}: {self.support!r} is not one of {self.splits}")
