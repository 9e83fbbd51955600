"""Groups the members of a tar shard into samples, and chooses each sample's image and caption.

By WebDataset's rule, adjacent members whose names are equal up to the first dot (of the last
path component) are one sample: `0.jpg`, `0.seg.png`, `0.txt`. But shards packed by other tools
have dots in file names (`a.2021.jpg` and `a.2021.txt` next to `a.2022.jpg`), or all images
before all texts. So:

- Among adjacent members with the same key by WebDataset's rule, an image and a text whose
  names are equal up to the *last* dot are a sample of their own, unless the word before the
  suffix names a part of a sample (`WORDS`). Other members join the sample with the longest
  name that is a prefix of theirs.
- A repeated name starts a new sample.
- Incomplete samples are joined with members of the same key elsewhere in the shard if that is
  unambiguous; otherwise they are counted as REPEATED.
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
"""Words in the names of images that are not photographs, such as segmentation maps."""
CAPTION_WORDS = frozenset("caption captions text texts prompt description alt title".split())
OTHER_WORDS = frozenset(
    "cls class id index url license ocr box boxes bbox meta metadata info".split()
)
"""Words in the names of texts that are not captions."""
WORDS = IMAGE_WORDS | MAP_WORDS | CAPTION_WORDS | OTHER_WORDS

REPEATED = "sample of a key that repeats, apart from its other members"

Files = dict[str, ByteRange]
"""{the part of a name after the sample's key, in lower case, such as `seg.png`: its bytes}."""


@dataclasses.dataclass(frozen=True)
class TarSample:
    """The members of a sample.

    group: the key without the number that distinguishes samples with the same key.
    """

    key: str
    members: Files
    group: str = ""

    @property
    def image(self) -> ByteRange | None:
        """Returns its image."""
        return _chosen(self.members, IMAGE_ENDINGS, IMAGE_WORDS, MAP_WORDS)

    @property
    def text(self) -> ByteRange | None:
        """Returns its .txt file."""
        return _chosen(self.members, ("txt",), CAPTION_WORDS, MAP_WORDS | OTHER_WORDS)

    @property
    def about(self) -> ByteRange | None:
        """Returns its .json file."""
        return _chosen(self.members, ("json",), CAPTION_WORDS | {"meta", "metadata"}, MAP_WORDS)

    @property
    def other_images(self) -> int:
        """Returns the number of further images, not counting maps."""
        ranks = (_rank(name, IMAGE_ENDINGS, IMAGE_WORDS, MAP_WORDS) for name in self.members)
        return max(0, sum(rank < 3 for rank in ranks) - 1)


def samples(shard: str | pathlib.Path) -> Iterator[TarSample | str]:
    """Yields the samples of a shard, and a reason (str) for each unusable member."""
    tar_members: list[TarMember] = []
    for member in members(shard):
        if isinstance(member, str):
            yield member
        else:
            tar_members.append(member)
    yield from _numbered(_together(tar_members))


def _numbered(found: Iterable[TarSample | str]) -> Iterator[TarSample | str]:
    """Makes keys unique: the second sample with a key gets `key#2`."""
    count: dict[str, int] = {}
    for sample in found:
        if isinstance(sample, TarSample):
            number = count[sample.key] = count.get(sample.key, 0) + 1
            key = sample.key if number == 1 else f"{sample.key}#{number}"
            sample = dataclasses.replace(sample, key=key, group=sample.key)
        yield sample


def _together(tar_members: Iterable[TarMember]) -> Iterator[TarSample | str]:
    """Yields the samples of adjacent members, then those whose members are apart."""
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
    """Yields the samples made of separate members with one key by WebDataset's rule.

    Members that complete a sample in `whole` are added to it instead.
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
    """Yields runs of adjacent members with the same key, each until a name repeats."""
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
    """Splits the members with one key into samples, by the rest of their names."""
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
    """Sorts names with the most dots first."""
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
    """Chooses the best file with one of these suffixes: its name has nothing before the
    suffix, or else a liked word, or at least no refused one.
    """
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
