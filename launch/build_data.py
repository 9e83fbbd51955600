"""Turns raw sources into datasets that training reads.

    python -m launch.build_data --source=quickstart --output=runs/quickstart/data
    python -m launch.build_data --source=image_folder --input=photos --output=data/photos
    python -m launch.build_data --source=html_pages --input=site --input=more --output=data/site
    python -m launch.build_data --source=video_folder --input=clips --output=data/clips
    python -m launch.build_data --source=questions_folder --input=asked --output=data/asked
    python -m launch.build_data --source=webdataset --input=laion --output=data/laion
    python -m launch.build_data --source=coco --input=coco/annotations/captions_train2017.json
    --images=coco/train2017 --output=data/coco python -m launch.build_data --source=mmc4
    --input=mmc4/shards --images=mmc4/images --output=data/mmc4 python -m launch.build_data
    --source=obelics --input=obelics/data --images=obelics/downloaded --output=data/obelics
    python -m launch.build_data --source=tfds --input=coco_captions --output=data/coco_captions
    python -m launch.build_data --source=plain_text --input=books --output=data/books python -m
    launch.build_data --source=sentencepiece --input=data/books --input=data/photos
    --output=data/tokenizer --vocab_size=8000

A dataset lands in OUTPUT/1.0.0 and opens with `tfds.builder_from_directory`; its
statistics.json says what became of every source record, and samples.html shows some. A dataset
that is finished is left as it is; one that was interrupted is built again; one that another
process builds is refused. An entry that kills its process (out of memory, a fault in a library)
is named and counted, and the rest goes on.
"""

import itertools
import os
import pathlib
import sys
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Executor
from typing import Any

from absl import flags
from rich.console import Console
from rich.status import Status
from rich.table import Table

from data_pipelines.build import tfds
from data_pipelines.build.coco import Coco
from data_pipelines.build.html_pages import HtmlPages
from data_pipelines.build.image_folder import ImageFolder
from data_pipelines.build.images import ANY_IMAGE, ImageRules
from data_pipelines.build.interleaved import PAGES_RULES
from data_pipelines.build.mmc4 import Mmc4
from data_pipelines.build.obelics import Obelics
from data_pipelines.build.plain_text import PlainText
from data_pipelines.build.questions_folder import QuestionsFolder
from data_pipelines.build.sentencepiece_trainer import IMAGE_TAG, texts_in, train_tokenizer
from data_pipelines.build.source import DEFAULT_SHARES, Shares, Source
from data_pipelines.build.synthetic_world import build_quickstart
from data_pipelines.build.video_folder import VideoFolder
from data_pipelines.build.webdataset import WebDataset
from data_pipelines.build.workers import WorkerPool
from data_pipelines.build.writer import write_dataset
from data_pipelines.features import SPLITS
from flamingo_jax.errors import UserError
from flamingo_jax.processing.tokenizer import FILE_NAME, Tokenizer
from launch import command

_SPLITS = ("validation_share", "test_share", "split")
_RECORDS = ("input", "workers", *_SPLITS)
_IMAGE_RULES = ("min_side", "max_aspect", "short_side")
READS: dict[str, tuple[str, ...]] = {
    "quickstart": ("workers", "seed"),
    "image_folder": (*_RECORDS, "captions", *_IMAGE_RULES),
    "html_pages": (*_RECORDS, "alt_text", *_IMAGE_RULES),
    "video_folder": (*_RECORDS, "captions", "fps", "max_seconds", "short_side"),
    "questions_folder": (*_RECORDS, "captions", "fps", "max_seconds", *_IMAGE_RULES),
    "webdataset": (*_RECORDS, *_IMAGE_RULES),
    "coco": (*_RECORDS, "images", *_IMAGE_RULES),
    "mmc4": (*_RECORDS, "images", "min_similarity", *_IMAGE_RULES),
    "obelics": (*_RECORDS, "images", *_IMAGE_RULES),
    "tfds": (*_RECORDS, "kind", "field", "fps", *_IMAGE_RULES),
    "plain_text": (*_RECORDS, "document_characters"),
    "sentencepiece": ("input", "vocab_size", "model_type", "byte_fallback", "piece"),
}
"""For each source the flags that it reads, besides --source and --output."""
SOURCE = flags.DEFINE_enum("source", None, tuple(READS), "What to build from.")
INPUT = flags.DEFINE_multi_string(
    "input",
    [],
    "Folder (webdataset, coco, mmc4, obelics: or file) to read; several make one dataset. tfds:"
    " the name or folder of one dataset. sentencepiece: also datasets and text files.",
)
IMAGES = flags.DEFINE_multi_string(
    "images",
    [],
    "coco, mmc4, obelics: folder with the images, by name, as img2dataset downloads them, or"
    " named by the SHA-256 of their address; else they lie beside the input.",
)
MIN_SIMILARITY = flags.DEFINE_float(
    "min_similarity",
    Mmc4.min_similarity,
    "mmc4: images less similar to their sentence are dropped.",
)
KIND = flags.DEFINE_enum(
    "kind", None, tuple(tfds.USUAL), "tfds: what the records are; else what their features say."
)
FIELDS = flags.DEFINE_multi_string(
    "field",
    [],
    "tfds: feature that holds a field of the records, such as captions=annotations/text.",
)
OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Folder of the dataset, its last part the name; quickstart, sentencepiece: folder to fill.",
)
WORKERS = flags.DEFINE_integer(
    "workers", 0, "Processes that read the sources; 0 for one per core.", lower_bound=0
)
SEED = flags.DEFINE_integer("seed", 0, "quickstart: seed of the synthetic world.", lower_bound=0)
VALIDATION_SHARE = flags.DEFINE_float(
    "validation_share",
    None,
    "Part of the records, by a hash of the id; 0.1 unless --test_share=1.",
    lower_bound=0.0,
    upper_bound=1.0,
)
TEST_SHARE = flags.DEFINE_float(
    "test_share",
    0.0,
    "Part of the records for the split test.",
    lower_bound=0.0,
    upper_bound=1.0,
)
SPLIT = flags.DEFINE_enum(
    "split",
    None,
    SPLITS,
    "The split of all records, where the input is an official split already.",
)
CAPTIONS = flags.DEFINE_string(
    "captions",
    None,
    "Folders: the JSONL file; else captions.jsonl (or videos.jsonl), qa.jsonl.",
)
MIN_SIDE = flags.DEFINE_integer(
    "min_side",
    None,
    "Images with a shorter side are dropped; 64 for pages, else 1.",
    lower_bound=1,
)
MAX_ASPECT = flags.DEFINE_float(
    "max_aspect",
    None,
    "Images with a larger aspect are dropped; 3 for pages, else 20.",
    lower_bound=1.0,
)
SHORT_SIDE = flags.DEFINE_integer(
    "short_side",
    None,
    "Larger images shrink to this, 0 for never; 256 for videos, else 0.",
    lower_bound=0,
)
ALT_TEXT = flags.DEFINE_bool(
    "alt_text", False, "html_pages: an image's alternative text follows it."
)
FPS = flags.DEFINE_float(
    "fps",
    1.0,
    "Videos: frames a second (tfds: that its videos have).",
    lower_bound=1e-3,
    upper_bound=1e3,
)
MAX_SECONDS = flags.DEFINE_float(
    "max_seconds",
    64.0,
    "Videos: only the beginning of longer videos is used.",
    lower_bound=1e-3,
    upper_bound=1e6,
)
DOCUMENT_CHARACTERS = flags.DEFINE_integer(
    "document_characters", 4_000, "plain_text: paragraphs gather up to this.", lower_bound=1
)
VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 32_000, "sentencepiece: number of pieces.", lower_bound=1
)
MODEL_TYPE = flags.DEFINE_enum(
    "model_type", "bpe", ("bpe", "unigram"), "sentencepiece: how pieces are chosen."
)
BYTE_FALLBACK = flags.DEFINE_bool(
    "byte_fallback", True, "sentencepiece: unknown characters are written in bytes."
)
PIECES = flags.DEFINE_multi_string(
    "piece", [IMAGE_TAG], "sentencepiece: strings that are one piece each."
)


def main() -> int:
    if not SOURCE.value or not OUTPUT.value:
        raise UserError(
            "--source and --output must be set: see `python -m launch.build_data --help`"
        )
    output, given = pathlib.Path(OUTPUT.value), command.given_flags()
    command.refuse_unread(
        {f"--source={source}": names for source, names in READS.items()},
        f"--source={SOURCE.value}",
        given,
    )
    if SOURCE.value != "quickstart" and not INPUT.value:
        raise UserError(f"--input is not set: name what --source={SOURCE.value} shall read")
    if SOURCE.value == "sentencepiece":
        return build_tokenizer(output)
    with workers() as executor:
        if SOURCE.value == "quickstart":
            made = build_quickstart(output, seed=SEED.value, executor=executor)
        else:
            described = source(shares(given))
            check_used(described, given)
            made = {output.name: write_dataset(output, described, executor)}
    report(made)
    return 0


def check_used(source: Source, given: Collection[str]) -> None:
    """A UserError for a flag that the source reads, but that its input leaves without use."""
    if source.shares is None and (without := sorted(set(given) & set(_SPLITS))):
        raise UserError(
            f"--input has splits of its own, which --{without[0]} does not change: leave it out"
        )
    if isinstance(source, tfds.Tfds) and source.kind != "videos" and "fps" in given:
        raise UserError(f"--fps is for videos, and --input makes {source.kind}: leave it out")


def shares(given: Collection[str]) -> Shares:
    """How records are dealt to the splits. UserError for flags that contradict each other."""
    if SPLIT.value is not None:
        if other := sorted(set(given) & set(_SPLITS) - {"split"}):
            raise UserError(f"--split={SPLIT.value} takes all records: leave out --{other[0]}")
        return Shares.whole(SPLIT.value)
    test, validation = TEST_SHARE.value, VALIDATION_SHARE.value
    if validation is None:
        validation = 0.0 if test == 1 else DEFAULT_SHARES.validation
    if validation + test > 1:
        raise UserError(
            f"--validation_share={validation} and --test_share={test} are more than all"
            " records: mend them to 1 or less together"
        )
    return Shares(validation, test)


def source(shares: Shares) -> Source:
    """The source that the flags describe."""
    folders, images = tuple(INPUT.value), tuple(IMAGES.value)
    match SOURCE.value:
        case "image_folder":
            return ImageFolder(folders, shares, CAPTIONS.value, _rules(ANY_IMAGE))
        case "html_pages":
            return HtmlPages(folders, shares, _rules(PAGES_RULES), ALT_TEXT.value)
        case "video_folder":
            return VideoFolder(folders, shares, CAPTIONS.value, **_sampling("short_side"))
        case "questions_folder":
            return QuestionsFolder(
                folders,
                shares,
                CAPTIONS.value,
                _rules(ANY_IMAGE),
                **_sampling("video_short_side"),
            )
        case "webdataset":
            return WebDataset(folders, shares, _rules(ANY_IMAGE))
        case "coco":
            return Coco(folders, images, shares, _rules(ANY_IMAGE))
        case "mmc4":
            return Mmc4(folders, images, shares, _rules(PAGES_RULES), MIN_SIMILARITY.value)
        case "obelics":
            return Obelics(folders, images, shares, _rules(PAGES_RULES))
        case "tfds":
            return _tfds(folders, shares)
        case _:
            return PlainText(folders, shares, DOCUMENT_CHARACTERS.value)


def _tfds(names: tuple[str, ...], shares: Shares) -> Source:
    if len(names) > 1:
        raise UserError(
            f"--source=tfds reads one dataset, and --input names {len(names)}: build each into"
            " a folder of its own"
        )
    if wrong := [field for field in FIELDS.value if not all(field.partition("="))]:
        raise UserError(
            f"--field={wrong[0]} is not FIELD=FEATURE, such as --field=captions=annotations/text"
        )
    fields = tuple(
        (name, feature) for name, _, feature in (field.partition("=") for field in FIELDS.value)
    )
    return tfds.Tfds(names[0], shares, fields, KIND.value, _rules(ANY_IMAGE), FPS.value)


def _sampling(short_side: str) -> dict[str, Any]:
    """How videos are read; `short_side` is the source's name for theirs."""
    sides = {} if SHORT_SIDE.value is None else {short_side: SHORT_SIDE.value}
    return {"fps": FPS.value, "max_seconds": MAX_SECONDS.value, **sides}


def _rules(rules: ImageRules) -> ImageRules:
    """A source's own rules, changed by the flags that are set."""
    return ImageRules(
        min_side=rules.min_side if MIN_SIDE.value is None else MIN_SIDE.value,
        max_aspect=rules.max_aspect if MAX_ASPECT.value is None else MAX_ASPECT.value,
        short_side=rules.short_side if SHORT_SIDE.value is None else SHORT_SIDE.value,
    )


def build_tokenizer(output: pathlib.Path) -> int:
    file = output / FILE_NAME
    if file.exists():
        if (pieces := Tokenizer.load(file).pieces) != VOCAB_SIZE.value:
            raise UserError(
                f"{file} is there already, with {pieces} pieces in place of "
                f"--vocab_size={VOCAB_SIZE.value}: remove it, or choose another --output"
            )
        print(f"{file} is there already and is left as it is")
        return 0
    with Console(stderr=True).status("reading text") as status:
        train_tokenizer(
            _counted(itertools.chain.from_iterable(texts_in(path) for path in INPUT.value), status),
            output,
            vocab_size=VOCAB_SIZE.value,
            model_type=MODEL_TYPE.value,
            byte_fallback=BYTE_FALLBACK.value,
            user_defined=PIECES.value,
        )
    print(f"wrote {file}")
    return 0


def workers() -> Executor:
    """Processes that read the sources."""
    return WorkerPool(WORKERS.value or os.cpu_count() or 1)


def report(made: dict[str, tuple[dict[str, Any], bool]]) -> None:
    """A table of what became of every source record."""
    heads = ["dataset", "records read", "used", "in splits", "dropped"]
    heads += ["images used", "images dropped"]
    with_texts = any("texts" in statistics for statistics, _ in made.values())
    table = Table(*heads, *(["texts dropped"] if with_texts else []))
    for name, (statistics, new) in made.items():
        images = statistics.get("images", {"used": "", "dropped": {}})
        cells = (
            name if new else f"{name} (was there)",
            statistics["records_read"],
            statistics["used"],
            _listed(statistics["splits"]),
            _listed(statistics["dropped"]),
            images["used"],
            _listed(images["dropped"]),
        )
        texts = [_listed(statistics.get("texts", {"dropped": {}})["dropped"])] if with_texts else []
        table.add_row(*map(str, cells), *texts)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _listed(counts: dict[str, int]) -> str:
    return "\n".join(f"{count} {what}" for what, count in counts.items())


def _counted(texts: Iterable[str], status: Status) -> Iterator[str]:
    count = 0
    for count, text in enumerate(texts, start=1):
        if count % 1_000 == 0:
            status.update(f"read {count:,} texts")
        yield text
    status.update(f"choosing {VOCAB_SIZE.value:,} pieces from {count:,} texts")


if __name__ == "__main__":
    command.run(main)
