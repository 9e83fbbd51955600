"""Which members of a tar shard belong to one sample, and which of them is its image.

WebDataset's rule is that neighbours whose names are the same up to the first dot of their last
part
are one sample: `0.jpg`, `0.seg.png`, `0.txt`. Files that others packed have dots in their
names, `a.2021.jpg` and `a.2021.txt` beside `a.2022.jpg`, or stand by kind, all images first.
So, here:

- Among neighbours with the same key by WebDataset's rule, what has an image and a text of the
  same name up to the *last* dot is a sample of its own, unless what stands before its ending is
  a word for a part of a sample (`WORDS`). All else joins the longest name that it continues.
- A name that comes again begins a new sample.
- What is left alone is put together with the rest of its key from elsewhere in the shard, where
  it is clear which belongs to which, and counted as REPEATED where it is not.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping

from data_pipelines.build.byte_ranges import ByteRange
from data_pipelines.build.tars import TarMember, members

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXTS = ("txt", "json")

IMAGE_WORDS = frozenset("image img input rgb photo image color colour orig original".split())
MAP_WORDS = frozenset(
    "seg segmentation segment mask masks matte alpha depth disparity normal normals label"
    " labels semantic instance panoptic edge edges canny sketch pose flow heatmap albedo target"
    " output gt annotation annotations thumb thumbnail".split()
)
"""Of images that show something else than what the caption says."""
CAPTION_WORDS = frozenset("caption captions text texts prompt description alt title".split())
OTHER_WORDS = frozenset(
    "cls class id index url license ocr box boxes bbox meta metadata info".split()
)
"""Of texts that are no captions."""
WORDS = IMAGE_WORDS | MAP_WORDS | CAPTION_WORDS | OTHER_WORDS

REPEATED = "sample of a key that repeats, apart from its other members"

Files = dict[str, ByteRange]
"""Members of a sample by what follows its key, in small letters: `jpg`, `seg.png`."""


@dataclasses.dataclass(frozen=True)
class TarSample:
    """Members of a shard that belong together. group: the key, without the number that tells
    samples of one key apart.
    """

    key: str
    members: Files
    group: str = ""

    @property
    def image(self) -> ByteRange | None:
        return _chosen(self.members, IMAGE_ENDINGS, IMAGE_WORDS, MAP_WORDS)

    @property
    def text(self) -> ByteRange | None:
        return _chosen(self.members, ("txt",), CAPTION_WORDS, MAP_WORDS | OTHER_WORDS)

    @property
    def about(self) -> ByteRange | None:
        """Its .json file."""
        return _chosen(self.members, ("json",), CAPTION_WORDS | {"meta", "metadata"}, MAP_WORDS)

    @property
    def other_images(self) -> int:
        """Images beside its own, maps not among them."""
        ranks = (_rank(name, IMAGE_ENDINGS, IMAGE_WORDS, MAP_WORDS) for name in self.members)
        return max(0, sum(rank < 3 for rank in ranks) - 1)


def samples(shard: str | pathlib.Path) -> Iterator[TarSample | str]:
    """Yields the samples of a shard, and a reason for each member that is of no use."""
    tar_members: list[TarMember] = []
    for member in members(shard):
        if isinstance(member, str):
            yield member
        else:
            tar_members.append(member)
    yield from _numbered(_together(tar_members))


def _numbered(found: Iterable[TarSample | str]) -> Iterator[TarSample | str]:
    """A second sample of the same key gets a key of its own."""
    count: dict[str, int] = {}
    for sample in found:
        if isinstance(sample, TarSample):
            number = count[sample.key] = count.get(sample.key, 0) + 1
            key = sample.key if number == 1 else f"{sample.key}#{number}"
            sample = dataclasses.replace(sample, key=key, group=sample.key)
        yield sample


def _together(tar_members: Iterable[TarMember]) -> Iterator[TarSample | str]:
    """Samples of neighbours, then those whose members stand apart."""
    whole: dict[str, list[TarSample]] = {}
    parts: dict[str, list[dict[str, Files]]] = {}
    for first, run in _runs(tar_members):
        left: dict[str, Files] = {}
        for more, files in _groups(run).items():
            if _is_whole(files):
                key = _joined(first, more)
                whole.setdefault(key, []).append(TarSample(key, files))
            else:
                left[more] = files
        if left:
            parts.setdefault(first, []).append(left)
    apart = [sample for first, runs in parts.items() for sample in _apart(first, runs, whole)]
    for of_key in whole.values():
        yield from of_key
    yield from apart


def _apart(
    first: str, runs: list[dict[str, Files]], whole: Mapping[str, list[TarSample]]
) -> Iterator[TarSample | str]:
    """Samples out of the parts that stand apart under one key by WebDataset's rule.

    Those that complete a sample of neighbours are added to it, in `whole`.
    """
    pool = [
        (f"{more}.{ending}".lstrip("."), byte_range)
        for run in runs
        for more, files in run.items()
        for ending, byte_range in files.items()
    ]
    if len({name for name, _ in pool}) == len(pool):
        for more, files in _groups(dict(pool)).items():
            same = whole.get(_joined(first, more), [])
            if (
                len(same) == 1
                and not _is_whole(files)
                and not files.keys() & same[0].members.keys()
            ):
                same[0].members.update(files)
            else:
                yield TarSample(_joined(first, more), files)
        return
    ambiguous = _is_whole(dict(pool))
    for run in runs:
        for more, files in run.items():
            yield REPEATED if ambiguous else TarSample(_joined(first, more), files)


def _runs(tar_members: Iterable[TarMember]) -> Iterator[tuple[str, Files]]:
    """Neighbours of the same key by WebDataset's rule, with what follows it, until one repeats."""
    key, run = "", Files()
    for name, byte_range in tar_members:
        folder, slash, file = name.rpartition("/")
        stem, _, rest = file.partition(".")
        here, rest = f"{folder}{slash}{stem}", rest.lower()
        if here != key or rest in run:
            if run:
                yield key, run
            key, run = here, {}
        run[rest] = byte_range
    if run:
        yield key, run


def _groups(run: Files) -> dict[str, Files]:
    """Members of one key parted into samples, by what their names have after the key."""
    groups: dict[str, Files] = {}
    for rest, byte_range in run.items():
        more, _, ending = rest.rpartition(".")
        groups.setdefault(more, {})[ending] = byte_range
    for more in sorted(groups, key=_depth):
        parent, _, word = more.rpartition(".")
        if more and word in WORDS and (parent in groups or not _is_whole(groups[more])):
            _move(groups, more, parent)
    for more in sorted(groups, key=_depth):
        files = groups[more]
        has_image, has_text = _has(files, IMAGE_ENDINGS), _has(files, TEXTS)
        above = next((name for name in _above(more) if name in groups), None)
        if not has_image and not has_text:
            above = above or ""
        elif above is not None and not _is_whole(files):
            lacks = TEXTS if has_image else IMAGE_ENDINGS
            above = above if _has(groups[above], lacks) else None
        else:
            above = None
        if more and above is not None:
            _move(groups, more, above)
    return groups


def _depth(more: str) -> tuple[int, str]:
    """To go through the longest names first."""
    return -more.count(".") - bool(more), more


def _above(more: str) -> Iterator[str]:
    while more:
        more = more.rpartition(".")[0]
        yield more


def _move(groups: dict[str, Files], more: str, above: str) -> None:
    between = more[len(above) :].lstrip(".")
    to = groups.setdefault(above, {})
    for ending, byte_range in groups.pop(more).items():
        to[f"{between}.{ending}"] = byte_range


def _is_whole(files: Files) -> bool:
    return _has(files, IMAGE_ENDINGS) and _has(files, TEXTS)


def _has(files: Files, endings: Iterable[str]) -> bool:
    return any(name.rpartition(".")[2] in endings for name in files)


def _joined(first: str, more: str) -> str:
    return f"{first}.{more}" if more else first


def _chosen(
    files: Files, endings: Iterable[str], liked: Iterable[str], refused: Iterable[str]
) -> ByteRange | None:
    """The file with one of these endings that has nothing before it, a liked word, or at least
    none that is refused; the first of the best."""
    ranked = [
        (_rank(name, endings, liked, refused), byte_range) for name, byte_range in files.items()
    ]
    rank, byte_range = min(ranked, key=lambda one: one[0])
    return byte_range if rank < 3 else None


def _rank(name: str, endings: Iterable[str], liked: Iterable[str], refused: Iterable[str]) -> int:
    *before, ending = name.split(".")
    if ending not in endings or any(word in refused for word in before):
        return 3
    return 0 if not before else 1 if before[-1] in liked else 2
