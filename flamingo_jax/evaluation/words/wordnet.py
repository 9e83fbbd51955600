"""Reads WordNet 3.0 (Fellbaum 1998): base forms of words, and how similar two meanings are.

Lookups and similarities are those of nltk's reader, which NExT-OE's WUPS is computed with.
"""

import functools
import pathlib
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from flamingo_jax.errors import UserError

PLACES = (
    "/usr/share/wordnet",
    "~/nltk_data/corpora/wordnet",
    "/usr/share/nltk_data/corpora/wordnet",
    "/usr/local/share/nltk_data/corpora/wordnet",
)
"""Where the files are looked for: Debian's wordnet-base, then nltk's data."""
POS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
"""Parts of speech in the order in which meanings of a word are listed: their files' names."""
MAX_BYTES = 64 << 20
_ENDINGS = {
    "n": "s= ses=s ves=f xes=x zes=z ches=ch shes=sh men=man ies=y",
    "v": "s= ies=y es=e es= ed=e ed= ing=e ing=",
    "a": "er= est= er=e est=e",
    "r": "",
}
_KINDS = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}
"""Digits of the kind in a sense key; 5 is an adjective that clusters around another."""


class Synset(NamedTuple):
    """A meaning.

    name: such as "dog.n.01"; unique.
    pos: its part of speech.
    hypernyms: offsets of the more general meanings.
    """

    name: str
    pos: str
    hypernyms: tuple[int, ...]


class WordNet:
    """The words and meanings of a folder.

    Raises: UserError if its files are missing or are not WordNet's.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._data = {pos: self._read(f"data.{name}") for pos, name in POS.items()}
        self._offsets: dict[str, dict[str, list[int]]] = {}
        self._exceptions: dict[str, dict[str, list[str]]] = {}
        try:
            for pos, name in POS.items():
                self._offsets[pos] = dict(_index(self._text(f"index.{name}")))
                lines = (line.split() for line in self._text(f"{name}.exc").split("\n"))
                self._exceptions[pos] = {line[0]: line[1:] for line in lines if line}
        except (ValueError, IndexError) as error:
            raise UserError(f"{folder} has no files of WordNet 3.0: {error}") from None
        self._synsets: dict[tuple[str, int], Synset] = {}
        self._depths: dict[tuple[str, int], tuple[int, int]] = {}
        self.uses = self._count_uses()

    def base_forms(self, word: str, pos: str) -> list[str]:
        """Returns the words of a part of speech of which `word` may be a form, itself first."""
        if word in self._exceptions[pos]:
            forms = self._exceptions[pos][word]
        else:
            pairs = (ending.split("=") for ending in _ENDINGS[pos].split())
            forms = [word[: -len(old)] + new for old, new in pairs if word.endswith(old)]
        return [form for form in dict.fromkeys([word, *forms]) if form in self._offsets[pos]]

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - one reader lives as long as the process
    def first_meaning(self, word: str) -> tuple[str, int] | None:
        """Returns the part of speech and offset of the first meaning of a word, None if it is
        unknown.
        """
        for pos in POS:
            for form in self.base_forms(word.lower(), pos):
                return pos, self._offsets[pos][form][0]
        return None

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019
    def similarity(self, first: tuple[str, int], second: tuple[str, int]) -> float:
        """Computes the similarity of two meanings (Wu and Palmer 1994): 2 d / (d1 + d2), with the
        depths of both and of the deepest meaning that is more general than both.

        Meanings without a common one share a root above all, except two nouns.
        """
        above, other = self._distances(first), self._distances(second)
        rooted = first[0] != "n" or second[0] != "n"
        common = [key for key in above if key in other]
        depths = {key: self._depth(key)[0] for key in common}
        deepest = max([*depths.values(), *([0] if rooted else [])], default=None)
        if deepest is None:
            return 0.0
        candidates: list[tuple[str, tuple[str, int] | None]] = [
            (self._synset(key).name, key) for key in common if depths[key] == deepest
        ]
        if rooted and deepest == 0:
            candidates.append(("*ROOT*", None))
        _, chosen = min(candidates, key=lambda pair: pair[0])
        if any(key == first for _, key in candidates):
            chosen = first
        if chosen is None:
            # The root: as far above a meaning as the farthest meaning above it, and one more.
            lengths = [max(distances.values()) + 1 for distances in (above, other)]
            return 2.0 / (sum(lengths) + 2)
        depth = self._depth(chosen)[1] + 1
        to_chosen = self._distances(chosen)
        lengths = [
            min(distances[key] + to_chosen[key] for key in to_chosen if key in distances)
            for distances in (above, other)
        ]
        if rooted:
            over = max(to_chosen.values()) + 1
            lengths = [
                min(length, max(distances.values()) + 1 + over)
                for length, distances in zip(lengths, (above, other), strict=True)
            ]
        return 2.0 * depth / (sum(lengths) + 2 * depth)

    def _distances(self, start: tuple[str, int]) -> dict[tuple[str, int], int]:
        """Returns the steps from a meaning to each more general one, and to itself."""
        found: dict[tuple[str, int], int] = {}
        waiting = deque([(start, 0)])
        while waiting:
            key, distance = waiting.popleft()
            if key not in found:
                found[key] = distance
                waiting.extend(((key[0], up), distance + 1) for up in self._synset(key).hypernyms)
        return found

    def _depth(self, key: tuple[str, int]) -> tuple[int, int]:
        """Returns the lengths of the shortest and the longest path to a most general meaning."""
        if key not in self._depths:
            above = [self._depth((key[0], up)) for up in self._synset(key).hypernyms]
            self._depths[key] = (
                1 + min((low for low, _ in above), default=-1),
                1 + max((high for _, high in above), default=-1),
            )
        return self._depths[key]

    def _synset(self, key: tuple[str, int]) -> Synset:
        if key not in self._synsets:
            try:
                self._synsets[key] = self._parse(*key)
            except (ValueError, IndexError, KeyError):
                raise UserError(
                    f"{self._folder}/data.{POS[key[0]]} does not fit its index: give the files of"
                    " one WordNet 3.0"
                ) from None
        return self._synsets[key]

    def _parse(self, pos: str, offset: int) -> Synset:
        """Reads the line of a meaning (format: wndb(5WN))."""
        data = self._data[pos]
        fields = data[offset : data.index(b"\n", offset)].decode("latin-1").split(" | ")[0].split()
        if int(fields[0]) != offset:
            raise ValueError("the index points elsewhere")
        words, kind = int(fields[3], 16), fields[2]
        lemma = fields[4].partition("(")[0].lower()
        pointers = fields[4 + 2 * words + 1 :]
        hypernyms = tuple(
            int(pointers[place + 1])
            for place in range(0, 4 * int(fields[4 + 2 * words]), 4)
            if pointers[place] in ("@", "@i") and pointers[place + 3] == "0000"
        )
        sense = self._offsets[pos][lemma].index(offset) + 1
        return Synset(f"{lemma}.{kind}.{sense:02}", pos, hypernyms)

    def _count_uses(self) -> dict[tuple[str, str], int]:
        """Returns how often each (word, part of speech) is in the texts that WordNet's makers
        tagged.
        """
        uses: dict[tuple[str, str], int] = {}
        for line in self._text("cntlist.rev").split("\n"):
            if line:
                key, _, count = line.split()
                lemma, _, kind = key.partition("%")
                pair = lemma, _KINDS[kind[0]]
                uses[pair] = uses.get(pair, 0) + int(count)
        return uses

    def _text(self, name: str) -> str:
        return self._read(name).decode("latin-1")

    def _read(self, name: str) -> bytes:
        path = self._folder / name
        try:
            if path.stat().st_size > MAX_BYTES:
                raise UserError(f"{path} is larger than a file of WordNet")
            return path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}): --wordnet names the folder of WordNet"
                " 3.0's files, such as Debian's wordnet-base installs or nltk.download('wordnet')"
            ) from None


def _index(text: str) -> Iterator[tuple[str, list[int]]]:
    """Yields each word of an index file with the offsets of its meanings."""
    for line in text.split("\n"):
        if line and line[0] != " ":
            fields = line.split()
            meanings = int(fields[2])
            yield fields[0], [int(offset) for offset in fields[-meanings:]]


def find_wordnet(folder: str = "") -> pathlib.Path:
    """Returns the folder of WordNet's files: the one given, or the first of `PLACES`.

    Raises: UserError if there is none.
    """
    if folder:
        return pathlib.Path(folder).expanduser()
    for place in PLACES:
        path = pathlib.Path(place).expanduser()
        if (path / "index.noun").is_file():
            return path
    raise UserError(
        "WordNet 3.0 was not found: install it (Debian: wordnet-base) or name its folder with"
        " --wordnet"
    )


@functools.cache
def read_wordnet(folder: str = "") -> WordNet:
    """Reads WordNet from the folder given, or the first of `PLACES`; each folder once.

    Raises: UserError as `WordNet` and `find_wordnet` do.
    """
    return WordNet(find_wordnet(folder))
