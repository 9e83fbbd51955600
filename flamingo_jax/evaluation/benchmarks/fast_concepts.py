"""Open-ended miniImageNet: made-up names ("dax") that a query's own shots teach, so that nothing
but in-context learning can answer. In the files of Frozen (Tsimpoukelli et al. 2021) and of
VL-ICL (Zong et al. 2024), which takes 200 queries from them.

Prompts are Frozen's, `<image>This is a dax`, and answers count as VL-ICL counts them: the first
line must equal the name.
"""

import itertools
import pathlib
from typing import Any

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import (
    NO_SUPPORT,
    BenchmarkSet,
    SplitContent,
)
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.benchmarks.vl_icl import MAX_TOKENS, VlIclImages
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.prompts import PromptTemplate, split_last_word
from flamingo_jax.evaluation.scoring import files
from flamingo_jax.evaluation.selection.shots import keyed_rng

NAMING = PromptTemplate("{question}")
THIS_IS_A = "This is a"
QUERIES = "query.json"


def read_frozen(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads open_ended_mi_<split>_all_questions.json: image_1, caption_1, ... are a query's
    shots, then question_image, question and answer. A caption is the question and a name, as in
    "This is a dax"; where it is not, its last word is the name.
    """
    place = folder / f"open_ended_mi_{split}_all_questions.json"
    images = MediaFolder(folder)
    examples = []
    for number, entry in enumerate(files.as_list(files.read_json(str(place)), str(place))):
        where = f"{place}, question {number},"
        name = str(files.field(entry, "question_id", where, int, str))
        question = files.field(entry, "question", where, str).strip()
        shots = []
        for at in itertools.count(1):
            if f"image_{at}" not in entry:
                break
            caption = files.field(entry, f"caption_{at}", where, str).strip()
            before, word = question, caption.removeprefix(question).strip()
            if not caption.startswith(question) or not word:
                before, word = split_last_word(caption)
            image = images.image(files.field(entry, f"image_{at}", where, str))
            shots.append(BenchmarkExample(f"{name}/{at}", image, (word,), before))
        if not shots:
            raise UserError(f"{where} has no 'image_1': each question needs its shots")
        image = images.image(files.field(entry, "question_image", where, str))
        answer = files.field(entry, "answer", where, str)
        examples.append(BenchmarkExample(name, image, (answer,), question, context=tuple(shots)))
    return SplitContent(examples, [place])


def read_vl_icl(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads query.json of VL-ICL's open_mi: {"image", "answer", "classes", "support": {name:
    {"images"}}}.

    As VL-ICL's experiments do, a query has shots of its own class and of one other, in turn and
    in an order that are drawn for it: twice as many shots as VL-ICL counts, which are its shots of
    each class.
    """
    place = folder / QUERIES
    images = VlIclImages(folder)
    entries = files.as_list(files.read_json(str(place)), str(place))
    examples = []
    for number, entry in enumerate(entries):
        where = f"{place}, query {number},"
        answer = files.field(entry, "answer", where, str)
        shots = [
            BenchmarkExample(
                f"{number}/{name}/{at}", images.image(shown, where), (name,), THIS_IS_A
            )
            for name, at, shown in _two_way(entry, number, answer, where)
        ]
        image = images.only(entry, where)
        examples.append(
            BenchmarkExample(str(number), image, (answer,), THIS_IS_A, context=tuple(shots))
        )
    return SplitContent(examples, [place])


def _two_way(entry: Any, number: int, answer: str, where: str) -> list[tuple[str, int, Any]]:
    """Returns (name, number, image) of a query's shots."""
    support = files.as_dict(entry.get("support"), f"{where} support")
    others = [name for name in files.field(entry, "classes", where, list) if name != answer]
    if answer not in support or not others or not all(name in support for name in others):
        raise UserError(f"{where} must have support for its answer and for each of its classes")
    rng = keyed_rng(0, f"open_mi/{number}")
    pair = [answer, others[int(rng.integers(len(others)))]]
    if rng.integers(2):
        pair.reverse()
    shown = [files.field(support[name], "images", f"{where} {name},", list) for name in pair]
    return [
        (name, at, image)
        for at, both in enumerate(zip(*shown, strict=False))
        for name, image in zip(pair, both, strict=True)
    ]


def _frozen(shots: int, ways: int) -> BenchmarkSet:
    """Makes the benchmark of so many shots of each of so many classes."""
    split = f"shots_{shots}_ways_{ways}"
    return BenchmarkSet(
        name=f"open_mini_imagenet_{split}",
        title=f"Open-ended miniImageNet, {shots} x {ways} shots",
        layout={
            f"open_ended_mi_{split}_all_questions.json": "questions with their shots",
            f"open_ended_mi_{split}_id_1_question.jpg": "an image, beside all others",
        },
        kind="generate",
        template=NAMING,
        scorer="first_line",
        read=read_frozen,
        splits=(split,),
        support=NO_SUPPORT,
        max_tokens=MAX_TOKENS,
        shots=(shots * ways,),
        text_examples=0,
    )


OPEN_MINI_IMAGENET = tuple(_frozen(shots, ways) for ways in (2, 5) for shots in (1, 3, 5))

VL_ICL_OPEN_MI = BenchmarkSet(
    name="vl_icl_open_mi",
    title="Open-ended miniImageNet (VL-ICL)",
    layout={
        QUERIES: "queries with the images of their shots",
        "query/": "images of queries",
        "support/": "images of shots",
    },
    kind="generate",
    template=NAMING,
    scorer="first_line",
    read=read_vl_icl,
    splits=("query",),
    support=NO_SUPPORT,
    max_tokens=MAX_TOKENS,
    shots=(0, 2, 4, 8, 10),
    text_examples=0,
)
