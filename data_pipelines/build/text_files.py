"""The one reader of text files: their encoding, their lines, and JSON lines.

UTF-8, with or without a byte order mark, or UTF-16 and UTF-32 where a byte order mark says so.
A
line ends at a line feed, with or without a carriage return before it, and nowhere else: U+2028
and its like are part of a text. Bytes that are of no encoding become lone surrogates, which
`as_utf8` refuses.
"""

import codecs
import json
import pathlib
from collections.abc import Iterator
from typing import IO, Any

from flamingo_jax.errors import UserError

MAX_LINE = 64 << 20
"""Characters; a longer line is no record."""
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # Before UTF-16, whose mark it begins with.
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
    """A text that is no UTF-8; the message is the reason."""


class TooLongLine:
    """Stands for a line of more than MAX_LINE characters."""


TOO_LONG_LINE = TooLongLine()


def _mark(error: UnicodeError) -> tuple[str, int]:
    """A lone surrogate in place of what is of no encoding."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\udc80", error.end


codecs.register_error(_MARKED, _mark)


def encoding_of(start: bytes) -> tuple[str, str]:
    """Returns the encoding that a file's first bytes tell, and how its errors are handled.

    In UTF-8 they keep their bytes (surrogateescape), of which file names may be made.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if start.startswith(mark):
            return encoding, "surrogateescape" if encoding == "utf-8-sig" else _MARKED
    return "utf-8", "surrogateescape"


def decode(data: bytes) -> str:
    """Decodes the text of a file, byte order mark and carriage returns before line feeds taken
    away.
    """
    encoding, errors = encoding_of(data[:4])
    return data.decode(encoding, errors).replace("\r\n", "\n")


def text_lines(file: pathlib.Path, limit: int = MAX_LINE) -> Iterator[str | TooLongLine]:
    """Yields the lines of a file without their ends, read one by one. Raises OSError.

    Of a line longer than `limit` characters nothing is kept.
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
    """Yields the lines of a file without their ends, longer ones in parts of `limit`
    characters.

    Raises OSError.
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
    """Yields what each line holds that is not blank.

    None for one that is no JSON, TOO_LONG_LINE for one that is too long. Bytes that are no
    UTF-8 fail in `as_utf8`, or name a file. Raises UserError where the file cannot be read.
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
    """Returns the error for a file without which nothing can be built."""
    return UserError(f"{file} cannot be read ({error.strerror}): mend it or take it out")


def parsed(text: str) -> Any:
    """Returns the value that a JSON text holds, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # The second is for a thousand brackets.
        return None


def as_utf8(text: str) -> str:
    """Returns the text, blanks around it gone.

    Raises NotUtf8 for one that no dataset can hold: JSON can name half of a character too.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NotUtf8(NOT_UTF8) from error
    return text.strip()
