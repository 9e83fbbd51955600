"""Candidate answers as a tree of tokens, so that what candidates have in common is read once.

A tree is cut into parts of bounded size for the device. Each part repeats the ancestors of its
tokens, so that parts are scored independently.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

TREE_TOKENS = 256
"""About as many tokens has a part at most: enough to fill the cores, few enough that attention
among them is small beside the rest of the model.
"""


class TreePart(NamedTuple):
    """A part of a tree: n tokens in depth-first order, and the e next tokens of candidates whose
    probabilities are wanted. Arrays int32.

    tokens, depths, ends: [n]; the subtree of token i is i .. ends[i] - 1. The first token stands
      for the last one of the prompt, whatever that is.
    sources, targets: [e]; token sources[k] of the part is followed by the id targets[k].
    """

    tokens: np.ndarray
    depths: np.ndarray
    ends: np.ndarray
    sources: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class CandidateTree:
    """C candidates as a tree of tokens in parts.

    paths: int32 [C, T, 2], for each token of a candidate the part and its index among that
      part's next tokens; -1 after a candidate's end.
    """

    parts: list[TreePart]
    paths: np.ndarray

    @property
    def longest(self) -> int:
        """Returns the number of tokens of the longest candidate."""
        return self.paths.shape[1]

    def scores(self, log_probabilities: np.ndarray) -> np.ndarray:
        """Sums the log-probabilities of each candidate's tokens -> float64 [C].

        log_probabilities: of the next tokens, [parts, e], padded.
        """
        part, place = self.paths[..., 0], self.paths[..., 1]
        each = log_probabilities[part, place].astype(np.float64)
        return np.where(part >= 0, each, 0.0).sum(axis=1)


def make_tree(candidates: Sequence[Sequence[int]], most: int = TREE_TOKENS) -> CandidateTree:
    """Makes the tree of candidates, each of one token id or more; equal ones are scored once.

    most: how many tokens a part has about at most.
    """
    if not candidates:
        return CandidateTree([], np.zeros((0, 0, 2), np.int32))
    distinct = sorted({tuple(ids) for ids in candidates})
    longest = max(map(len, distinct))
    read = 1 + len({ids[:end] for ids in distinct for end in range(1, len(ids))})
    # Parts of equal size, with room for the ancestors that they repeat.
    builder = _TreeBuilder(-(-read // -(-read // most)) + longest)
    # In sorted order candidates with a common beginning are neighbours.
    found = {ids: builder.add(ids) for ids in distinct}
    paths = np.full((len(candidates), longest, 2), -1, np.int32)
    for row, ids in enumerate(candidates):
        paths[row, : len(ids)] = found[tuple(ids)]
    return CandidateTree(builder.finish(), paths)


def make_trees(
    lists: Sequence[Sequence[str]], encode: Callable[[str], list[int]]
) -> list[CandidateTree]:
    """Makes the tree of each list of candidates, texts that `encode` turns into ids. Equal lists
    share a tree.
    """
    # By identity first: thousands of prompts may name one list of thousands of texts.
    by_list: dict[int, CandidateTree] = {}
    by_texts: dict[tuple[str, ...], CandidateTree] = {}
    for texts in lists:
        if id(texts) not in by_list:
            key = tuple(texts)
            if key not in by_texts:
                by_texts[key] = make_tree([encode(text) for text in key])
            by_list[id(texts)] = by_texts[key]
    return [by_list[id(texts)] for texts in lists]


class _TreeBuilder:
    """Grows the parts of a tree from candidates in sorted order.

    A token is read only where a candidate goes on from it: the last token of a candidate is a
    next token alone.

    most: of the tokens of a part.
    """

    def __init__(self, most: int):
        self._most = most
        self._parts: list[tuple[list[int], ...]] = []
        """Lists that become the arrays of a `TreePart`."""
        self._last: tuple[int, ...] = ()
        self._path: list[tuple[int, int]] = []
        """Of the last candidate, as in `CandidateTree.paths`."""
        self._open: list[int] = []
        """The tokens of the last part, by depth, that the last candidate goes through."""
        self._start(())

    def add(self, candidate: tuple[int, ...]) -> list[tuple[int, int]]:
        """Adds a candidate and returns its path: see `CandidateTree`."""
        shared = 0
        for mine, last in zip(candidate, self._last, strict=False):
            if mine != last:
                break
            shared += 1
        del self._path[shared:]
        self._end(shared + 1)
        for depth in range(shared, len(candidate)):
            if depth == len(self._open):
                if len(self._parts[-1][0]) == self._most:
                    self._start(candidate[: depth - 1])
                self._read(candidate[depth - 1])
            *_, sources, targets = self._parts[-1]
            self._path.append((len(self._parts) - 1, len(targets)))
            sources.append(self._open[depth])
            targets.append(candidate[depth])
        self._last = candidate
        return list(self._path)

    def finish(self) -> list[TreePart]:
        """Returns the parts."""
        self._end(0)
        return [TreePart(*(np.array(a, np.int32) for a in part)) for part in self._parts]

    def _start(self, ancestors: tuple[int, ...]) -> None:
        """Starts a part with the prompt's last token and `ancestors` after it."""
        self._end(0)
        self._parts.append(([], [], [], [], []))
        for token in (0, *ancestors):
            self._read(token)

    def _read(self, token: int) -> None:
        """Adds a token below the last of the open ones."""
        tokens, depths, ends, *_ = self._parts[-1]
        self._open.append(len(tokens))
        tokens.append(token)
        depths.append(len(self._open) - 1)
        ends.append(-1)

    def _end(self, depth: int) -> None:
        """Ends the subtrees of the open tokens from `depth` on."""
        for place in self._open[depth:]:
            tokens, _, ends, *_ = self._parts[-1]
            ends[place] = len(tokens)
        del self._open[depth:]
