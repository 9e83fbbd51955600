"""The registry of sources, by name, with the options of each, for `launch.build_data`.

To add a source, write a file with a class that implements `source.Source`, and an entry of
`SOURCES`. Sources are imported when they are made, so that `--help` and mistakes show at once.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from data_pipelines.build.source import DEFAULT_SHARES, Source, SplitFractions
from data_pipelines.features import SPLITS
from flamingo_jax.errors import UserError

Built = dict[str, tuple[dict[str, Any], bool]]
"""{dataset: (its statistics, whether it was built by this call)}."""


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a source, which is a flag on the command line.

    kind: str, int, float or bool.
    default: None where it depends on the source.
    several: the flag may be repeated; its value is then a list.
    low, high: the allowed range, inclusive.
    """

    help: str
    kind: type = str
    default: Any = None
    choices: tuple[str, ...] = ()
    several: bool = False
    low: float | None = None
    high: float | None = None


OPTIONS: dict[str, Option] = {
    "input": Option("Folder or file to read; several make one dataset.", several=True),
    "images": Option(
        "Folder with the images, by name, as img2dataset downloads them, or named by the SHA-256"
        " of their address; else they lie beside the input.",
        several=True,
    ),
    "min_similarity": Option("Images less similar to their sentence are dropped.", float, 0.0),
    "kind": Option(
        "What the records are; else what their features say.",
        choices=("questions", "videos", "pairs"),
    ),
    "field": Option(
        "Feature that holds a field of the records, such as captions=annotations/text.",
        several=True,
    ),
    "workers": Option("Processes that read the source; 0 for one per core.", int, 0, low=0),
    "seed": Option("Seed of the synthetic world.", int, 0, low=0),
    "validation_share": Option(
        "Part of the records, by a hash of the id; 0.1 unless --test_share=1.",
        float,
        low=0.0,
        high=1.0,
    ),
    "test_share": Option("Part of the records for the split test.", float, 0.0, low=0.0, high=1.0),
    "split": Option(
        "The split of all records, where the input is an official split already.", choices=SPLITS
    ),
    "captions": Option(
        "The JSONL file in the folder; else captions.jsonl, or also videos.jsonl for videos, or"
        " qa.jsonl and questions.jsonl for questions."
    ),
    "min_side": Option("Images with a shorter side are dropped; 64 for pages, else 1.", int, low=1),
    "max_aspect": Option(
        "Images with a larger aspect are dropped; 3 for pages, else 20.", float, low=1.0
    ),
    "short_side": Option(
        "Larger images shrink to this, 0 for never; 256 for videos, else 0.", int, low=0
    ),
    "alt_text": Option("An image's alternative text follows it.", bool, False),
    "fps": Option("Frames a second of videos.", float, 1.0, low=1e-3, high=1e3),
    "max_seconds": Option(
        "Only the beginning of longer videos is used.", float, 64.0, low=1e-3, high=1e6
    ),
    "document_characters": Option("Paragraphs gather up to this.", int, 4_000, low=1),
    "vocab_size": Option("Number of pieces.", int, 32_000, low=1),
    "model_type": Option("How pieces are chosen.", str, "bpe", choices=("bpe", "unigram")),
    "byte_fallback": Option("Unknown characters are written in bytes.", bool, True),
    "piece": Option("String that is one piece.", default=("<image>",), several=True),
}
"""Every option of every source."""

_SPLITS = ("validation_share", "test_share", "split")
_RECORDS = ("input", "workers", *_SPLITS)
_IMAGE_RULES = ("min_side", "max_aspect", "short_side")
_SAMPLING = ("fps", "max_seconds")


class SourceEntry(NamedTuple):
    """A source in the registry.

    about: one sentence for --help.
    example: arguments of a command that builds from it.
    options: the keys of `OPTIONS` that it reads.
    make: makes the source from the values of its options; None for those that are not a
      `Source` of records (quickstart, sentencepiece).
    """

    about: str
    example: str
    options: tuple[str, ...]
    make: Callable[["Values"], Source] | None = None


class Values:
    """The values of a source's options: as given, or their defaults."""

    def __init__(self, given: Mapping[str, Any]):
        self.given = dict(given)

    def __getitem__(self, name: str) -> Any:
        value = self.given.get(name, OPTIONS[name].default)
        return tuple(value or ()) if OPTIONS[name].several else value

    def some(self, *names: str, **renamed: str) -> dict[str, Any]:
        """Returns the given ones of these options as keyword arguments; `argument="option"`
        passes an option under another name.
        """
        wanted = {name: name for name in names} | renamed
        return {to: self.given[name] for to, name in wanted.items() if name in self.given}

    def shares(self) -> SplitFractions:
        """Makes the fractions of the splits; raises UserError for contradicting options."""
        if self["split"] is not None:
            if other := sorted(set(self.given) & set(_SPLITS) - {"split"}):
                raise UserError(
                    f"--split={self['split']} takes all records: leave out --{other[0]}"
                )
            return SplitFractions.whole(self["split"])
        test, validation = self["test_share"], self["validation_share"]
        if validation is None:
            validation = 0.0 if test == 1 else DEFAULT_SHARES.validation
        if validation + test > 1:
            raise UserError(
                f"--validation_share={validation} and --test_share={test} are more than all"
                " records: mend them to 1 or less together"
            )
        return SplitFractions(validation, test)


def _image_folder(values: Values) -> Source:
    from data_pipelines.build.image_folder import ImageFolder
    from data_pipelines.build.images import ANY_IMAGE

    rules = dataclasses.replace(ANY_IMAGE, **values.some(*_IMAGE_RULES))
    return ImageFolder(values["input"], values.shares(), values["captions"], rules)


def _html_pages(values: Values) -> Source:
    from data_pipelines.build.html_pages import HtmlPages
    from data_pipelines.build.interleaved import PAGES_RULES

    rules = dataclasses.replace(PAGES_RULES, **values.some(*_IMAGE_RULES))
    return HtmlPages(values["input"], values.shares(), rules, values["alt_text"])


def _video_folder(values: Values) -> Source:
    from data_pipelines.build.video_folder import VideoFolder

    sampling = values.some(*_SAMPLING, "short_side")
    return VideoFolder(values["input"], values.shares(), values["captions"], **sampling)


def _questions_folder(values: Values) -> Source:
    from data_pipelines.build.images import ANY_IMAGE
    from data_pipelines.build.questions_folder import QuestionsFolder

    rules = dataclasses.replace(ANY_IMAGE, **values.some(*_IMAGE_RULES))
    sampling = values.some(*_SAMPLING, video_short_side="short_side")
    return QuestionsFolder(values["input"], values.shares(), values["captions"], rules, **sampling)


def _webdataset(values: Values) -> Source:
    from data_pipelines.build.images import ANY_IMAGE
    from data_pipelines.build.webdataset import WebDataset

    rules = dataclasses.replace(ANY_IMAGE, **values.some(*_IMAGE_RULES))
    return WebDataset(values["input"], values.shares(), rules)


def _coco(values: Values) -> Source:
    from data_pipelines.build.coco import Coco
    from data_pipelines.build.images import ANY_IMAGE

    rules = dataclasses.replace(ANY_IMAGE, **values.some(*_IMAGE_RULES))
    return Coco(values["input"], values["images"], values.shares(), rules)


def _mmc4(values: Values) -> Source:
    from data_pipelines.build.interleaved import PAGES_RULES
    from data_pipelines.build.mmc4 import Mmc4

    rules = dataclasses.replace(PAGES_RULES, **values.some(*_IMAGE_RULES))
    similarity = values["min_similarity"]
    return Mmc4(values["input"], values["images"], values.shares(), rules, similarity)


def _obelics(values: Values) -> Source:
    from data_pipelines.build.interleaved import PAGES_RULES
    from data_pipelines.build.obelics import Obelics

    rules = dataclasses.replace(PAGES_RULES, **values.some(*_IMAGE_RULES))
    return Obelics(values["input"], values["images"], values.shares(), rules)


def _tfds(values: Values) -> Source:
    from data_pipelines.build.images import ANY_IMAGE
    from data_pipelines.build.tfds import Tfds

    names = values["input"]
    if len(names) > 1:
        raise UserError(
            f"--source=tfds reads one dataset, and --input names {len(names)}: build each into"
            " a folder of its own"
        )
    if wrong := [field for field in values["field"] if not all(field.partition("="))]:
        raise UserError(
            f"--field={wrong[0]} is not FIELD=FEATURE, such as --field=captions=annotations/text"
        )
    fields = tuple((name, path) for name, _, path in (f.partition("=") for f in values["field"]))
    rules = dataclasses.replace(ANY_IMAGE, **values.some(*_IMAGE_RULES))
    source = Tfds(names[0], values.shares(), fields, values["kind"], rules, values["fps"])
    if source.shares is None and (without := sorted(set(values.given) & set(_SPLITS))):
        raise UserError(
            f"--input has splits of its own, which --{without[0]} does not change: leave it out"
        )
    if source.kind != "videos" and "fps" in values.given:
        raise UserError(f"--fps is for videos, and --input makes {source.kind}: leave it out")
    return source


def _plain_text(values: Values) -> Source:
    from data_pipelines.build.plain_text import PlainText

    return PlainText(values["input"], values.shares(), values["document_characters"])


SOURCES: dict[str, SourceEntry] = {
    "quickstart": SourceEntry(
        "The synthetic world that the quickstart trains and is tested on: its datasets and its"
        " tokenizer, in folders below --output.",
        "--output=runs/quickstart/data",
        ("workers", "seed"),
    ),
    "image_folder": SourceEntry(
        'A folder of images and captions.jsonl, a line {"image": "dog.jpg", "captions": ["A dog."]}'
        " for each.",
        "--input=photos --output=data/photos",
        (*_RECORDS, "captions", *_IMAGE_RULES),
        _image_folder,
    ),
    "html_pages": SourceEntry(
        "Folders of HTML pages with their images: text and images in the order of the page.",
        "--input=site --input=more --output=data/site",
        (*_RECORDS, "alt_text", *_IMAGE_RULES),
        _html_pages,
    ),
    "video_folder": SourceEntry(
        'A folder of videos and captions.jsonl, a line {"video": "wave.mp4", "captions": ["A'
        ' wave."]} for each.',
        "--input=clips --output=data/clips",
        (*_RECORDS, "captions", *_SAMPLING, "short_side"),
        _video_folder,
    ),
    "questions_folder": SourceEntry(
        'A folder of images or videos and qa.jsonl, a line {"image": "dog.jpg", "question": "What'
        ' is it?", "answer": "a dog"} for each question.',
        "--input=asked --output=data/asked",
        (*_RECORDS, "captions", *_SAMPLING, *_IMAGE_RULES),
        _questions_folder,
    ),
    "webdataset": SourceEntry(
        "Tar shards of WebDataset or img2dataset: images with .txt or .json captions.",
        "--input=laion --output=data/laion",
        (*_RECORDS, *_IMAGE_RULES),
        _webdataset,
    ),
    "coco": SourceEntry(
        "Captions in COCO's JSON form and the folder of their images.",
        "--input=coco/annotations/captions_train2017.json --images=coco/train2017"
        " --output=data/coco",
        (*_RECORDS, "images", *_IMAGE_RULES),
        _coco,
    ),
    "mmc4": SourceEntry(
        "MMC4's JSON lines, or OpenFlamingo's shards of it, with their images.",
        "--input=mmc4/shards --images=mmc4/images --output=data/mmc4",
        (*_RECORDS, "images", "min_similarity", *_IMAGE_RULES),
        _mmc4,
    ),
    "obelics": SourceEntry(
        "OBELICS's parquet files, their images downloaded by img2dataset or within the files.",
        "--input=obelics/data --images=obelics/downloaded --output=data/obelics",
        (*_RECORDS, "images", *_IMAGE_RULES),
        _obelics,
    ),
    "tfds": SourceEntry(
        "A TFDS dataset, by its name or the folder of a prepared one.",
        "--input=coco_captions --output=data/coco_captions",
        (*_RECORDS, "kind", "field", "fps", *_IMAGE_RULES),
        _tfds,
    ),
    "plain_text": SourceEntry(
        "Folders of .txt files, cut to documents at paragraphs.",
        "--input=books --output=data/books",
        (*_RECORDS, "document_characters"),
        _plain_text,
    ),
    "sentencepiece": SourceEntry(
        "A SentencePiece tokenizer, learned from datasets, text files or folders of them.",
        "--input=data/books --input=data/photos --output=data/tokenizer --vocab_size=8000",
        ("input", "vocab_size", "model_type", "byte_fallback", "piece"),
    ),
}


def refuse_options(name: str, given: Collection[str]) -> None:
    """Raises UserError where an option was given that only other sources read."""
    for option in sorted(given):
        readers = [source for source, entry in SOURCES.items() if option in entry.options]
        if readers and name not in readers:
            raise UserError(
                f"--{option} is not read by {name} but by {', '.join(readers)}: leave it out, or"
                " choose one of these"
            )


def make_source(name: str, given: Mapping[str, Any]) -> Source:
    """Makes the source called `name` from the given options.

    Raises: UserError for options that it does not read, that contradict each other, or that
      have no effect on its input.
    """
    refuse_options(name, given)
    make = SOURCES[name].make
    if make is None:
        raise ValueError(f"{name} is no source of records")
    if not given.get("input"):
        raise UserError(f"--input is not set: name what {name} shall read")
    return make(Values(given))


def build(
    name: str,
    output: pathlib.Path,
    given: Mapping[str, Any],
    executor: Callable[[], AbstractContextManager[Executor | None]],
) -> Built:
    """Builds the datasets of a source and returns the statistics of each.

    executor: starts the pool of worker processes, after the options have been checked.
    """
    refuse_options(name, given)
    if SOURCES[name].make is None:
        from data_pipelines.build.synthetic_world import build_quickstart

        with executor() as pool:
            return build_quickstart(output, seed=Values(given)["seed"], executor=pool)
    from data_pipelines.build.writer import write_dataset

    source = make_source(name, given)
    with executor() as pool:
        return {output.name: write_dataset(output, source, pool)}
