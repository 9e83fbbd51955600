"""Caption files: JSON lines, each with the name of a file below the folder and its captions."""

import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from flamingo_jax.errors import UserError

BAD_LINE = "caption line that is not JSON with a name and captions"
MISSING = "missing"
NO_CAPTION = "no caption"
NOT_UTF8 = "text that is not UTF-8"
OUTSIDE = "outside the folder"


def existing_folder(folder: str | pathlib.Path, flag: str = "--input") -> pathlib.Path:
    """Raises UserError where the folder is not there, which `flag` names."""
    path = pathlib.Path(folder)
    if not path.is_dir():
        raise UserError(f"there is no folder {path}: mend {flag}")
    return path


def caption_file(folder: pathlib.Path, name: str | None, usual: Sequence[str], line: str) -> pathlib.Path:
    """The caption file of that name, or the first usual one. Raises UserError where there is none, with a line for example."""
    for candidate in [name] if name else usual:
        if (folder / candidate).is_file():
            return folder / candidate
    raise UserError(
        f"{folder} has no {name or ' or '.join(usual)}: write lines of JSON such as {line}, or name the file with --captions"
    )


def json_lines(file: pathlib.Path) -> Iterator[Any]:
    """What each line holds that is not blank; None for one that is no JSON. Bytes that are no UTF-8 fail in `as_utf8`, or name a file."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for line in lines:
            if line.strip():
                yield parsed(line)


def parsed(text: str) -> Any:
    """The value that a JSON text holds, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # The second is for a thousand brackets.
        return None


def as_utf8(text: str) -> str:
    """The text, blanks around it gone. Raises NotUtf8 for one that no dataset can hold: JSON can name half of a character too."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NotUtf8(NOT_UTF8) from error
    return text.strip()


class NotUtf8(ValueError):
    """A text that is no UTF-8; the message is the reason."""


def texts_of(record: dict[str, Any], several: str, one: str) -> list[str]:
    """The texts in the list under `several`, or the one under `one` (or a list there), without empty ones.

    Raises KeyError, TypeError or NotUtf8.
    """
    said = record[several] if several in record else record[one]
    said = said if isinstance(said, list) else [said]
    if not all(isinstance(text, str) for text in said):
        raise TypeError(f"{several} must be texts")
    return [text for text in map(as_utf8, said) if text]


def read_captions(file: pathlib.Path, key: str, root: pathlib.Path) -> tuple[dict[str, list[str]], list[str]]:
    """Captions by file name, relative to the folder `root`, in the order of the lines, and for each line that is of no use the reason.

    A line has the name under `key` and `captions` (a list) or `caption`; lines about the same file are joined.
    """
    captions: dict[str, list[str]] = {}
    bad = []
    for record in json_lines(file):
        try:
            said = texts_of(record, "captions", "caption")
            captions.setdefault(relative(record[key], root), []).extend(said)
        except NotUtf8 as error:
            bad.append(str(error))
        except (ValueError, KeyError, TypeError):
            bad.append(BAD_LINE)
    return captions, bad


def why_not(root: pathlib.Path, path: pathlib.Path) -> str | None:
    """OUTSIDE or MISSING where there is no such file in the folder, links followed; None where there is."""
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            return OUTSIDE
        return None if path.is_file() else MISSING
    except (OSError, ValueError, RuntimeError):  # A name that no file can have: too long, not in Unicode, links in a circle.
        return MISSING


def relative(name: str, root: pathlib.Path) -> str:
    """The one way of writing a file's name, so that all lines about a file are found together."""
    if os.path.isabs(name):
        name = os.path.relpath(os.path.realpath(name), os.path.realpath(root))
    return os.path.normpath(name)
