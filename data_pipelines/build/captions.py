"""Reads caption files: JSON lines, each with the name of a file below the folder and its
captions.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from data_pipelines.build.files import LINKED, FileRefused, NameResolver, find
from data_pipelines.build.text_files import (
    EMPTY,
    NOT_A_TEXT,
    NOT_UTF8,
    TOO_LONG,
    TOO_LONG_LINE,
    NotUtf8,
    as_utf8,
    json_lines,
)
from flamingo_jax.errors import UserError

BAD_LINE = "caption line that is not JSON with a name and captions"
NO_CAPTION = "no caption"


def caption_file(
    folder: pathlib.Path, name: str | None, usual: Sequence[str], line: str
) -> pathlib.Path:
    """Finds the caption file called `name`, or the first of the usual names if that is None.

    Raises: UserError where there is none, which shows `line` as an example.
    """
    if name and (folder / name).is_file():
        return folder / name
    for candidate in () if name else usual:
        try:
            return find((folder,), candidate)
        except FileRefused as error:
            if str(error) == LINKED:
                raise UserError(
                    f"{folder / candidate} is a {error}: name the file itself with --captions"
                ) from error
    raise UserError(
        f"{folder} has no {name or ' or '.join(usual)}: write lines of JSON such as {line}, or"
        " name the file with --captions"
    )


class Texts(NamedTuple):
    """The usable texts of a record, and the reason for each unusable one."""

    kept: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    def and_(self, other: "Texts") -> "Texts":
        """Concatenates both."""
        return Texts(self.kept + other.kept, self.lost + other.lost)


def read_texts(record: Any, several: str, one: str) -> Texts:
    """Reads a record's texts: the list in the field `several`, or the field `one`.

    An item may also be {one: text}, as VQA has its answers. Empty and unusable items are left
    out, each with its reason.

    Raises: KeyError where both fields are missing; NotUtf8 or TypeError where no item is
      usable.
    """
    if not isinstance(record, dict):
        raise TypeError("no record")
    said = record.get(several) or (record[one] if one in record else record[several])
    kept: list[str] = []
    lost: list[str] = []
    for item in said if isinstance(said, list) else [said]:
        text: Any = item.get(one) if isinstance(item, dict) else item
        if reason := why_no_text(text):
            lost.append(reason)
        else:
            kept.append(as_utf8(text))
    if not kept and NOT_UTF8 in lost:
        raise NotUtf8(NOT_UTF8)
    if not kept and NOT_A_TEXT in lost:
        raise TypeError(f"{several} must be texts")
    return Texts(tuple(kept), tuple(lost))


def why_no_text(value: Any) -> str | None:
    """Returns why a value is not a text: EMPTY (also for null, and for NaN, which tables use
    for it), NOT_A_TEXT or NOT_UTF8; None if it is one.
    """
    if is_missing(value):
        return EMPTY
    if not isinstance(value, str):
        return NOT_A_TEXT
    try:
        return None if as_utf8(value) else EMPTY
    except NotUtf8 as error:
        return str(error)


def is_missing(value: Any) -> bool:
    """Returns whether a value is null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


class Captions(NamedTuple):
    """The content of a caption file.

    by_name: {file: its texts}, in the order of the lines.
    bad: the reason for each unusable line.
    """

    by_name: dict[str, Texts]
    bad: list[str]


def read_captions(file: pathlib.Path, key: str, resolve_name: NameResolver) -> Captions:
    """Reads a caption file.

    A line has the file's name in the field `key`, and `captions` (a list) or `caption`. Lines
    of the same file, by `resolve_name`, are joined.
    """
    found: dict[str, Texts] = {}
    bad = []
    for record in json_lines(file):
        try:
            texts = read_texts(record, "captions", "caption")
            name = resolve_name(file_name(record[key]))
            found[name] = found.get(name, Texts()).and_(texts)
        except NotUtf8 as error:
            bad.append(str(error))
        except (ValueError, KeyError, TypeError):
            bad.append(TOO_LONG if record is TOO_LONG_LINE else BAD_LINE)
    return Captions(found, bad)


def file_name(value: Any) -> str:
    """Returns a field's value as a file name; raises TypeError unless a nonempty string."""
    if not isinstance(value, str) or not value:
        raise TypeError("no name of a file")
    return value
