"""CLEVR count induction of VL-ICL (Zong et al. 2024): shots tell that `size: large` asks for the
number of large objects, so that the score measures in-context learning.
"""

import pathlib
import re
from typing import Any

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.media import ImageFile
from flamingo_jax.evaluation.prompts import PromptTemplate
from flamingo_jax.evaluation.scoring import files

MAX_TOKENS = 15
"""Of an answer, as VL-ICL's I2T_inference.py generates."""
INDUCTION = PromptTemplate("{question}\nAnswer:")
"""VL-ICL's prompt for OpenFlamingo, without a description of the task."""


class VlIclImages:
    """The images of one of VL-ICL's tasks, in query/ and support/."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._folders: dict[str, MediaFolder] = {}

    def image(self, path: Any, where: str) -> ImageFile:
        """Returns the image of a path such as "clevr/query/1.png", of which the last two parts
        count. Raises UserError.
        """
        found = re.fullmatch(r"(?:.*/)?(query|support)/([^/\\]+)", path if path else "")
        if not found:
            raise UserError(f"{where} has the image {path!r}, which is not in query/ or support/")
        if found[1] not in self._folders:
            self._folders[found[1]] = MediaFolder(self._folder / found[1])
        return self._folders[found[1]].image(found[2])

    def only(self, entry: Any, where: str) -> ImageFile:
        """Returns the image of an entry, "image": a list of one, or its path."""
        named = files.field(entry, "image", where, list, str)
        paths = [named] if isinstance(named, str) else named
        if len(paths) != 1 or not isinstance(paths[0], str):
            raise UserError(f"{where} has {len(paths)} images, not one")
        return self.image(paths[0], where)


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads query.json or support.json of the task clevr: {"image", "question", "answer"}."""
    place = folder / f"{split}.json"
    images = VlIclImages(folder)
    examples = []
    for number, entry in enumerate(files.as_list(files.read_json(str(place)), str(place))):
        where = f"{place}, entry {number},"
        image = images.only(entry, where)
        answer = str(files.field(entry, "answer", where, int, str))
        question = files.field(entry, "question", where, str)
        examples.append(BenchmarkExample(f"{split}/{number}", image, (answer,), question))
    return SplitContent(examples, [place])


VL_ICL_CLEVR = BenchmarkSet(
    name="vl_icl_clevr",
    title="CLEVR count induction (VL-ICL)",
    layout={
        "{query,support}.json": "questions such as size: large, and counts",
        "query/": "images of queries",
        "support/": "images of shots",
    },
    kind="generate",
    template=INDUCTION,
    scorer="first_line",
    read=read,
    splits=("query", "support"),
    support="support",
    max_tokens=MAX_TOKENS,
    shots=(0, 1, 2, 4, 8),
    text_examples=0,
)
