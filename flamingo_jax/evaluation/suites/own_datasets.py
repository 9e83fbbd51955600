"""Builds the benchmarks that `launch.evaluate --benchmark=...` describes, and reads their
examples.
"""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation import prompts
from flamingo_jax.evaluation.datasets import DatasetReader, DrawnRecords
from flamingo_jax.evaluation.examples import (
    BenchmarkExample,
    first_answer,
    read_examples,
    read_pages,
)
from flamingo_jax.evaluation.protocol.benchmark import Benchmark
from flamingo_jax.evaluation.protocol.classification import Classification
from flamingo_jax.evaluation.protocol.fast_concept_binding import FastConceptBinding
from flamingo_jax.evaluation.protocol.open_ended import (
    captioning,
    most_frequent_answer,
    question_answering,
)
from flamingo_jax.evaluation.selection.shots import draw
from flamingo_jax.evaluation.suites.description import BenchmarkDescription
from flamingo_jax.processing.text import text_of
from flamingo_jax.progress import Bar


@dataclasses.dataclass(frozen=True)
class BenchmarkReader:
    """Reads benchmarks for a model.

    limit, support_limit: the most queries and support examples, drawn at random by `seed`; 0
      for all.
    fps: frames a second of clips; by default as in the model's training.
    caption_prompt: the prompt before a caption.
    question_prompt: the prompt with {question}; None for the one of `trained_prompts`, or the
      paper's where that is empty.
    trained_prompts: the distinct question prompts that the model was trained with.
    classes_file: a file of class names, one a line; "" for all classes of the data.
    """

    datasets: DatasetReader
    limit: int = 0
    support_limit: int = 2048
    seed: int = 0
    fps: float | None = None
    caption_prompt: str = prompts.CAPTION.text
    question_prompt: str | None = None
    trained_prompts: Sequence[str] = ()
    classes_file: str = ""

    def read(self, description: BenchmarkDescription, shots: int, text_examples: int) -> Benchmark:
        """Reads a benchmark's queries and, where its prompts need some, its support examples.

        Raises: UserError for a dataset of the wrong kind, or a file that cannot be read.
        """
        kind, name, path, split, support_path, support_split, names_support = description
        if kind == "binding":
            records = self.datasets.records(path, split, "pages")
            pages = read_pages(self._drawn(records, path, split, self.limit))
            return FastConceptBinding(name, pages)
        queries = self._examples(path, split, self.limit)
        support: list[BenchmarkExample] = []
        if names_support or shots or (text_examples and kind != "classification"):
            support = self._examples(support_path, support_split, self.support_limit)
        captions = prompts.PromptTemplate(self.caption_prompt)
        if kind == "captioning":
            return captioning(name, queries, support, template=captions)
        questions = self._question_template()
        if kind == "vqa":
            majority = self._majority_answer(support_path, support_split)
            return question_answering(name, queries, support, questions, majority)
        classes = self._classes(path, split, support)
        template = questions if any(query.question for query in queries) else captions
        return Classification(name, queries, support, classes, template)

    def _question_template(self) -> prompts.PromptTemplate:
        """Chooses the question prompt; raises UserError where it is ambiguous."""
        given, trained = self.question_prompt, self.trained_prompts
        if given is None and len(trained) > 1:
            listed = ", ".join(map(repr, trained))
            raise UserError(
                f"the model was trained with several prompts ({listed}): choose one with"
                " --question_prompt"
            )
        if given is None:
            given = trained[0] if trained else prompts.QUESTION.text
        return prompts.question_template(given)

    def _majority_answer(self, path: str, split: str) -> str:
        """Finds the most frequent answer of a split; "" where there is no such split."""
        if split not in self.datasets.splits(path):
            return ""
        records = self.datasets.records(path, split, "questions")
        return most_frequent_answer(
            [text_of(answer) for answer in records[place]["answers"]]
            for place in range(len(records))
        )

    def _examples(self, path: str, split: str, limit: int) -> list[BenchmarkExample]:
        kind, records = self._open(path, split)
        drawn = self._drawn(records, path, split, limit)
        return read_examples(drawn, kind, fps=self.fps, name=f"{path}:{split}")

    def _open(self, path: str, split: str) -> tuple[str, Sequence[Any]]:
        kind = self.datasets.kind(path)
        if kind not in ("pairs", "videos", "questions"):
            raise UserError(
                f"the dataset {path} holds {kind}, but pairs, videos or questions are needed"
            )
        return kind, self.datasets.records(path, split, kind)

    def _drawn(self, records: Sequence[Any], path: str, split: str, limit: int) -> Sequence[Any]:
        return DrawnRecords(records, draw(self.seed, f"{path}:{split}", len(records), limit))

    def _classes(self, path: str, split: str, support: Sequence[BenchmarkExample]) -> list[str]:
        """Lists all classes of the split, also those of records beyond `limit`: with fewer
        classes to choose from the task would be easier.
        """
        if self.classes_file:
            return read_classes(self.classes_file)
        kind, records = self._open(path, split)
        answers = {example.answers[0] for example in support}
        with Bar(f"classes of {path}", len(records)) as bar:
            for place in range(len(records)):
                answers.add(first_answer(records[place], kind))
                bar.advance()
        return sorted(answers - {""})


def read_classes(file: str) -> list[str]:
    """Reads class names, one a line.

    Raises: UserError where the file has none or has one twice.
    """
    try:
        lines = pathlib.Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--classes={file} cannot be read as text ({error}): name a file of class names"
        ) from error
    classes = [line.strip() for line in lines if line.strip()]
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        raise UserError(
            f"--classes={file} has {twice[0]!r} more than once: give each class a name of its own"
        )
    if not classes:
        raise UserError(f"--classes={file} holds no class: write one a line")
    return classes
