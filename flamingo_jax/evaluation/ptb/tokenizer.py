"""Tokenizes captions as pycocoevalcap does: by Stanford's Penn Treebank tokenizer, in lower case,
without punctuation. In Python, so that CIDEr, BLEU and ROUGE-L need no Java.
"""

import array
import functools
import sys
from collections.abc import Iterator, Sequence

from flamingo_jax.evaluation.ptb.longest_match import Node, Scanner
from flamingo_jax.evaluation.ptb.rules import RULES, TokenRule, parsed

PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())
"""Tokens that are removed. Brackets are in lower case by then, so that -lrb- stays: as in
pycocoevalcap.
"""
_BREAKS = str.maketrans(dict.fromkeys("\n\r\u2028\u2029\u000b\u000c", " "))
_TRIMMED = " \t\n\u000b\u000c\r\u0085"


def tokenize(captions: Sequence[str]) -> list[str]:
    """Tokenizes captions; returns each as its tokens separated by single spaces.

    All captions are one text of a caption a line, as in pycocoevalcap: whether "U.S." at the
    end of one ends a sentence depends on how the next one begins. Other line breaks within a
    caption count as spaces; pycocoevalcap would assign the rest to the next caption.
    """
    lines = raw_tokens("\n".join(caption.translate(_BREAKS) for caption in captions)).split("\n")
    return [
        " ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION)
        for line in lines[: len(captions)]
    ]


def raw_tokens(text: str) -> str:
    """Returns the tokens of a text with all punctuation, separated by spaces within a line and by
    newlines as in the text: the output of PTBTokenizer with -preserveLines -lowerCase.
    """
    units = _utf16(text)
    written: list[str] = []
    begins_line = True
    for token in _tokens(units):
        if token != "\n" and not begins_line:
            written.append(" ")
        written.append(token.lower() if token != "\n" else token)
        begins_line = token == "\n"
    return _from_utf16("".join(written)) if units is not text else "".join(written)


def _tokens(text: str) -> Iterator[str]:
    """Yields the tokens as they are written, "\\n" at the end of a line."""
    scanner, place = _scanner(), 0
    while place < len(text):
        number, end = scanner.longest(text, place)
        rule = RULES[number]
        if rule.before:
            end = _start_of_context(rule, text, place, end)
        if rule.trims:
            while end > place and text[end - 1] in _TRIMMED:
                end -= 1
        token_end = end - rule.give_back
        if rule.ends_sentence:
            # The period is a part of the abbreviation and ends the sentence: it is written
            # twice. That of a single letter is no part of it.
            end -= 1
            token_end = end if rule.trims and end == place + 1 else end + 1
        else:
            end = token_end
        token = rule.write(text[place:token_end])
        if token is not None:
            yield token
        place = max(end, place + 1)


def _start_of_context(rule: TokenRule, text: str, start: int, end: int) -> int:
    """Returns where the token of a rule ends whose match, context included, is text[start:end]:
    as late as its pattern and its context allow.
    """
    token, context = parsed(rule.pattern), parsed(rule.before)
    if (length := context.length()) is not None:
        return end - length
    if (length := token.length()) is not None:
        return start + length
    ends = _scanner_of(token).ends(text, start, end)
    after = _scanner_of(context)
    return next(place for place in reversed(ends) if end in after.ends(text, place, end))


@functools.cache
def _scanner() -> Scanner:
    return Scanner(
        [
            Node("sequence", (parsed(rule.pattern), parsed(rule.before)))
            if rule.before
            else parsed(rule.pattern)
            for rule in RULES
        ]
    )


@functools.cache
def _scanner_of(node: Node) -> Scanner:
    return Scanner([node])


def _utf16(text: str) -> str:
    """Returns a text with each character beyond U+FFFF as its two surrogates, as Java has it; the
    text itself if it has none.
    """
    if text.isascii() or max(text) <= "\uffff":
        return text
    order = "le" if sys.byteorder == "little" else "be"
    return "".join(map(chr, array.array("H", text.encode(f"utf-16-{order}", "surrogatepass"))))


def _from_utf16(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
