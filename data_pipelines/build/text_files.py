"""Reads text files and JSON lines; all sources use this, so that encodings are treated alike.

Files are UTF-8 with or without a byte order mark, or UTF-16 or UTF-32 with one. Lines end at a
line feed, with or without a carriage return, and nowhere else (not at U+2028). Invalid bytes
become lone surrogates, which `as_utf8` rejects.
"""

import codecs
import json
import pathlib
from collections.abc import Iterator
from typing import IO, Any

from flamingo_jax.errors import UserError

MAX_LINE = 64 << 20
"""Characters. Longer lines are counted as dropped."""
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # Before UTF-16: its mark begins with UTF-16's.
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
EMPTY = "empty text"
NOT_A_TEXT = "text that is none (a number, a list)"
NOT_UTF8 = "text that is not UTF-8"
TOO_LONG = f"line over {MAX_LINE >> 20} million characters"
_MARKED = "flamingo_jax.marked"


class NotUtf8(ValueError):
    """Raised for a text that is not valid UTF-8; the message is the reason."""


class TooLongLine:
    """Stands for a line of more than MAX_LINE characters."""


TOO_LONG_LINE = TooLongLine()


def _mark(error: UnicodeError) -> tuple[str, int]:
    """Replaces undecodable bytes by a lone surrogate; an error handler for `codecs`."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\udc80", error.end


codecs.register_error(_MARKED, _mark)


def encoding_of(start: bytes) -> tuple[str, str]:
    """Returns (encoding, error handler) for a file with these first bytes.

    For UTF-8 the handler is surrogateescape, which preserves invalid bytes: they may be part
    of a file name.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if start.startswith(mark):
            return encoding, "surrogateescape" if encoding == "utf-8-sig" else _MARKED
    return "utf-8", "surrogateescape"


def decode(data: bytes) -> str:
    """Decodes a file's content, without byte order mark, with line feeds for CR LF."""
    encoding, errors = encoding_of(data[:4])
    return data.decode(encoding, errors).replace("\r\n", "\n")


def text_lines(file: pathlib.Path, limit: int = MAX_LINE) -> Iterator[str | TooLongLine]:
    """Yields the lines of a file without line ends; TOO_LONG_LINE for those of more than
    `limit` characters, which are skipped without holding them in memory. Raises OSError.
    """
    with _opened(file) as opened:
        while line := opened.readline(limit + 2):
            bare = line.removesuffix("\n").removesuffix("\r")
            if len(bare) <= limit:
                yield bare
                continue
            _skip_line(opened, line)
            yield TOO_LONG_LINE


def line_parts(file: pathlib.Path, limit: int = MAX_LINE) -> Iterator[str]:
    """Yields the lines of a file without line ends, long ones in parts of `limit` characters.

    Raises: OSError.
    """
    with _opened(file) as opened:
        while line := opened.readline(limit):
            yield line.removesuffix("\n").removesuffix("\r")


def _opened(file: pathlib.Path) -> IO[str]:
    with file.open("rb") as raw:
        encoding, errors = encoding_of(raw.read(4))
    return file.open(encoding=encoding, errors=errors, newline="\n")


def _skip_line(opened: IO[str], line: str) -> None:
    while line and not line.endswith("\n"):
        line = opened.readline(1 << 20)


def json_lines(file: pathlib.Path) -> Iterator[Any]:
    """Yields the JSON value of each nonblank line: None for invalid JSON, TOO_LONG_LINE for a
    line that is too long.

    Invalid UTF-8 is not detected here but by `as_utf8`, since it may be part of a file name.

    Raises: UserError where the file cannot be read.
    """
    try:
        for line in text_lines(file):
            if isinstance(line, TooLongLine):
                yield line
            elif line.strip():
                yield parsed(line)
    except OSError as error:
        raise unreadable(file, error) from error


def unreadable(file: pathlib.Path, error: OSError) -> UserError:
    """Makes the error for a required file that cannot be read."""
    return UserError(f"{file} cannot be read ({error.strerror}): mend it or take it out")


def parsed(text: str) -> Any:
    """Parses JSON; returns None if it is invalid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: thousands of nested brackets.
        return None


def as_utf8(text: str) -> str:
    """Strips a text.

    Raises: NotUtf8 if it contains lone surrogates: from invalid bytes, or escaped in JSON.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NotUtf8(NOT_UTF8) from error
    return text.strip()
