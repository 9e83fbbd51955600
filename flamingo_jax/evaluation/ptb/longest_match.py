"""Scans text with a list of patterns as a lexer generator (lex, JFlex) does: the longest match
wins, then the first pattern. Python's `re` takes the first alternative that matches instead.

The patterns are compiled to one automaton (Thompson 1968), of which only the states that a text
reaches are built.

Syntax of a pattern: literals, `.` (any character), `[a-z]`, `[^a-z]`, `(...)`, `|`, `?`, `*`,
`+`, `{2}`, `{2,4}`, escapes `\\n \\t \\r \\f \\xHH \\uHHHH`, a backslash before a punctuation
mark, and `\\p{name}` for a class that the caller defines. Letters match both cases, except in a
class in brackets.
"""

import bisect
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

MAX_CODE = 0xFFFF
"""Texts are scanned in UTF-16 code units, as Java does."""
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f"}
_SPECIAL = frozenset("()|[]?*+{}.\\")


class CharSet:
    """A set of characters as sorted disjoint ranges."""

    def __init__(self, ranges: Iterable[tuple[int, int]]):
        merged: list[list[int]] = []
        for first, last in sorted(ranges):
            if merged and first <= merged[-1][1] + 1:
                merged[-1][1] = max(merged[-1][1], last)
            else:
                merged.append([first, last])
        self.ranges = tuple((first, last) for first, last in merged)
        self._firsts = [first for first, _ in self.ranges]

    def __contains__(self, code: int) -> bool:
        place = bisect.bisect_right(self._firsts, code) - 1
        return place >= 0 and code <= self.ranges[place][1]

    def complement(self) -> "CharSet":
        """Returns the characters that are not in the set."""
        gaps, start = [], 0
        for first, last in self.ranges:
            if first > start:
                gaps.append((start, first - 1))
            start = last + 1
        if start <= MAX_CODE:
            gaps.append((start, MAX_CODE))
        return CharSet(gaps)


class Node(NamedTuple):
    """A part of a pattern.

    kind: "set" (one character of `chars`), "sequence", "choice", or "repeat" (of parts[0], from
      `least` to `most` times; None for any number).
    """

    kind: str
    parts: tuple["Node", ...] = ()
    chars: CharSet | None = None
    least: int = 0
    most: int | None = None

    def length(self) -> int | None:
        """Returns the length of all strings that match, None if they differ."""
        lengths = [part.length() for part in self.parts]
        if self.kind == "set":
            return 1
        if None in lengths:
            return None
        if self.kind == "sequence":
            return sum(length or 0 for length in lengths)
        if self.kind == "choice":
            return lengths[0] if len(set(lengths)) == 1 else None
        return self.least * (lengths[0] or 0) if self.least == self.most else None


class Parser:
    """Parses patterns (see the module's docstring).

    Args:
      classes: {name: the set that `\\p{name}` stands for}.
    """

    def __init__(self, classes: Mapping[str, CharSet]):
        self._classes = classes
        self._text, self._place = "", 0

    def parse(self, pattern: str) -> Node:
        """Returns the tree of a pattern. Raises ValueError if it is malformed."""
        self._text, self._place = pattern, 0
        node = self._choice()
        if self._place < len(pattern):
            raise ValueError(f"{pattern!r} has an extra {pattern[self._place]!r}")
        return node

    def _peek(self) -> str:
        return self._text[self._place] if self._place < len(self._text) else ""

    def _take(self) -> str:
        char = self._text[self._place]
        self._place += 1
        return char

    def _choice(self) -> Node:
        options = [self._sequence()]
        while self._peek() == "|":
            self._take()
            options.append(self._sequence())
        return options[0] if len(options) == 1 else Node("choice", tuple(options))

    def _sequence(self) -> Node:
        parts = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom()))
        return parts[0] if len(parts) == 1 else Node("sequence", tuple(parts))

    def _repeated(self, node: Node) -> Node:
        while self._peek() in ("?", "*", "+", "{") and self._peek():
            mark = self._take()
            if mark == "{":
                end = self._text.index("}", self._place)
                least, _, most = self._text[self._place : end].partition(",")
                self._place = end + 1
                node = Node("repeat", (node,), least=int(least), most=int(most or least))
            else:
                most_of = {"?": 1, "*": None, "+": None}[mark]
                node = Node("repeat", (node,), least=int(mark == "+"), most=most_of)
        return node

    def _atom(self) -> Node:
        char = self._take()
        if char == "(":
            node = self._choice()
            if self._peek() != ")":
                raise ValueError(f"{self._text!r} has an open parenthesis")
            self._take()
            return node
        if char == "[":
            return Node("set", chars=self._bracket())
        if char == ".":
            return Node("set", chars=CharSet([(0, MAX_CODE)]))
        if char == "\\":
            return Node("set", chars=self._escaped())
        if char in _SPECIAL:
            raise ValueError(f"{self._text!r} has a stray {char!r}")
        return Node("set", chars=both_cases(char))

    def _escaped(self) -> CharSet:
        """Reads what follows a backslash outside brackets."""
        if self._peek() == "p":
            return self._class()
        return both_cases(self._escape())

    def _class(self) -> CharSet:
        end = self._text.index("}", self._place)
        name = self._text[self._place + 2 : end]
        self._place = end + 1
        return self._classes[name]

    def _escape(self) -> str:
        char = self._take()
        if char in "xu":
            digits = 2 if char == "x" else 4
            code = self._text[self._place : self._place + digits]
            self._place += digits
            return chr(int(code, 16))
        return _ESCAPES.get(char, char)

    def _bracket(self) -> CharSet:
        negated = self._peek() == "^"
        if negated:
            self._take()
        ranges: list[tuple[int, int]] = []
        while self._peek() != "]":
            char = self._take()
            if char == "\\":
                if self._peek() == "p":
                    ranges += self._class().ranges
                    continue
                char = self._escape()
            last = char
            if self._peek() == "-" and self._text[self._place + 1] != "]":
                self._take()
                last = self._take()
                if last == "\\":
                    last = self._escape()
            ranges.append((ord(char), ord(last)))
        self._take()
        return CharSet(ranges).complement() if negated else CharSet(ranges)


_ALSO = {"s": "\u017f", "k": "\u212a", "i": "\u0130\u0131"}
"""Letters beyond ASCII that are a letter's other case: long s, the Kelvin sign, Turkish i."""


def both_cases(char: str) -> CharSet:
    """Returns a character in lower and upper case."""
    forms = {char, char.lower(), char.upper(), *_ALSO.get(char.lower(), "")}
    return CharSet([(ord(form), ord(form)) for form in forms if len(form) == 1])


class Scanner:
    """Finds the longest match of any of several patterns at a place of a text.

    Args:
      patterns: the trees, the first ones preferred where matches are of equal length.
    """

    def __init__(self, patterns: Sequence[Node]):
        self._edges: list[tuple[CharSet, int] | None] = []
        self._jumps: list[list[int]] = []
        self._accepts: dict[int, int] = {}
        start = self._new()
        for rule, node in enumerate(patterns):
            first, last = self._add(node)
            self._jumps[start].append(first)
            self._accepts[last] = rule
        self._states: dict[frozenset[int], _State] = {}
        self._start = self._state([start])

    def longest(self, text: str, start: int) -> tuple[int, int]:
        """Returns (index of the pattern, end of its match); (-1, start) if none matches."""
        state, found, end = self._start, -1, start
        for place in range(start, len(text)):
            char = text[place]
            try:
                after = state.next[char]
            except KeyError:
                after = state.next[char] = self._step(state, ord(char))
            if after is None:
                break
            state = after
            if state.rule >= 0:
                found, end = state.rule, place + 1
        return found, end

    def ends(self, text: str, start: int, stop: int) -> list[int]:
        """Returns the ends of all matches within text[start:stop], the shortest first."""
        state, found = self._start, []
        for place in range(start, stop):
            char = text[place]
            after = state.next[char] if char in state.next else self._step(state, ord(char))
            state.next[char] = after
            if after is None:
                break
            state = after
            if state.rule >= 0:
                found.append(place + 1)
        return found

    def _new(self, edge: tuple[CharSet, int] | None = None) -> int:
        self._edges.append(edge)
        self._jumps.append([])
        return len(self._edges) - 1

    def _add(self, node: Node) -> tuple[int, int]:
        """Adds the automaton of a node; returns its first and last state."""
        if node.chars is not None:
            last = self._new()
            return self._new((node.chars, last)), last
        first = last = self._new()
        if node.kind == "sequence":
            for part in node.parts:
                begin, end = self._add(part)
                self._jumps[last].append(begin)
                last = end
            return first, last
        if node.kind == "choice":
            last = self._new()
            for part in node.parts:
                begin, end = self._add(part)
                self._jumps[first].append(begin)
                self._jumps[end].append(last)
            return first, last
        for _ in range(node.least):
            begin, end = self._add(node.parts[0])
            self._jumps[last].append(begin)
            last = end
        if node.most is None:
            begin, end = self._add(node.parts[0])
            after = self._new()
            self._jumps[last] += [begin, after]
            self._jumps[end] += [begin, after]
            return first, after
        after = self._new()
        self._jumps[last].append(after)
        for _ in range(node.most - node.least):
            begin, end = self._add(node.parts[0])
            self._jumps[last].append(begin)
            self._jumps[end].append(after)
            last = end
        return first, after

    def _state(self, reached: Iterable[int]) -> "_State":
        """Returns the state of the positions `reached` and those that jumps lead to."""
        closed, waiting = set(), list(reached)
        while waiting:
            position = waiting.pop()
            if position not in closed:
                closed.add(position)
                waiting += self._jumps[position]
        # Only positions that read a character or accept tell states apart.
        key = frozenset(p for p in closed if self._edges[p] or p in self._accepts)
        if key not in self._states:
            rule = min((self._accepts[p] for p in key if p in self._accepts), default=-1)
            edges = [edge for p in key if (edge := self._edges[p]) is not None]
            self._states[key] = _State(edges, rule)
        return self._states[key]

    def _step(self, state: "_State", code: int) -> "_State | None":
        reached = [target for chars, target in state.edges if code in chars]
        return self._state(reached) if reached else None


class _State:
    """A state of the automaton; `next` is filled as characters are met."""

    __slots__ = ("edges", "next", "rule")

    def __init__(self, edges: list[tuple[CharSet, int]], rule: int):
        self.edges, self.rule = edges, rule
        self.next: dict[str, _State | None] = {}
