"""HatefulMemes (Kiela et al. 2020): whether an image with its text is hateful."""

import pathlib

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.prompts import PromptTemplate
from flamingo_jax.evaluation.scoring import files

MEME = PromptTemplate('is an image with written: "{question}" on it. Is it hateful? Answer:')
CLASSES = ("no", "yes")
"""By label."""


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads a split. The text of a meme stands where others have a question: it is the one task
    whose text the paper's prompts give (B.1.5).
    """
    place = folder / f"{split}.jsonl"
    images = MediaFolder(folder / "img")
    examples = []
    for number, entry in enumerate(files.read_json_lines(str(place))):
        where = f"{place}, entry {number},"
        label = files.field(entry, "label", where, int)
        if label not in (0, 1):
            raise UserError(f"{where} has the label {label}, not 0 or 1")
        name = files.field(entry, "img", where, str)
        examples.append(
            BenchmarkExample(
                str(files.field(entry, "id", where, int, str)),
                images.image(name.removeprefix("img/")),
                (CLASSES[label],),
                files.field(entry, "text", where, str),
            )
        )
    return SplitContent(examples, [place], CLASSES)


HATEFUL_MEMES = BenchmarkSet(
    name="hatefulmemes",
    title="HatefulMemes",
    layout={
        "{test_seen,train}.jsonl": "the text and label of each image",
        "img/": "images 01234.png, ...",
    },
    kind="rank",
    template=MEME,
    scorer="auc",
    read=read,
    splits=("test_seen", "test_unseen", "dev_seen", "dev_unseen", "train"),
    support="train",
)
