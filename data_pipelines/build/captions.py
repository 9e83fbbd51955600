"""Caption files: JSON lines, each with the name of a file below the folder and its captions."""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.build.files import LINKED, NoFile, Spelled, find
from flamingo_jax.errors import UserError

BAD_LINE = "caption line that is not JSON with a name and captions"
NO_CAPTION = "no caption"
NOT_UTF8 = "text that is not UTF-8"


def caption_file(folder: pathlib.Path, name: str | None, usual: Sequence[str], line: str) -> pathlib.Path:
    """The caption file of that name, or the first usual one. Raises UserError where there is none, with a line for example."""
    if name and (folder / name).is_file():
        return folder / name
    for candidate in () if name else usual:
        try:
            return find((folder,), candidate)
        except NoFile as error:
            if str(error) == LINKED:
                raise UserError(
                    f"{folder / candidate} is a {error}: name the file itself with --captions"
                ) from error
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


def read_captions(
    file: pathlib.Path, key: str, spelled: Spelled
) -> tuple[dict[str, list[str]], list[str]]:
    """Captions by file name as `spelled` has it, in the order of the lines, and for each line that
    is of no use the reason.

    A line has the name under `key` and `captions` (a list) or `caption`; lines about the same file are joined.
    """
    captions: dict[str, list[str]] = {}
    bad = []
    for record in json_lines(file):
        try:
            said = texts_of(record, "captions", "caption")
            captions.setdefault(spelled(record[key]), []).extend(said)
        except NotUtf8 as error:
            bad.append(str(error))
        except (ValueError, KeyError, TypeError):
            bad.append(BAD_LINE)
    return captions, bad
