"""Reads the files that are scored. They may come from anywhere: their size is bounded, and they
are JSON, CSV or arrays without objects, so that reading them runs nothing.
"""

import csv
import hashlib
import io
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from flamingo_jax import paths
from flamingo_jax.errors import UserError

MAX_BYTES = 1 << 30
"""Size of a text file; VQAv2's largest has 0.4 GB."""
MAX_ARRAY_BYTES = 4 << 30
"""Size of an array file."""
MAX_TEXT = 100_000
"""Length of a caption or an answer in characters."""


def read_json(place: str) -> Any:
    """Reads a JSON file. Raises UserError in one sentence if that fails."""
    return parse_json(read_text(place), place)


def read_json_lines(place: str) -> list[Any]:
    """Reads a file with a JSON value on each line, or a JSON list."""
    text = read_text(place)
    if text.lstrip().startswith("["):
        return as_list(parse_json(text, place), place)
    lines = enumerate(text.split("\n"), 1)
    return [parse_json(line, f"{place}, line {number},") for number, line in lines if line.strip()]


def parse_json(text: str, where: str) -> Any:
    """Parses JSON. Raises UserError that names `where` it is from."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON: {error}") from None


def read_csv(place: str, columns: Collection[str]) -> list[dict[str, str]]:
    """Reads a CSV file with a header.

    Raises: UserError if one of `columns` is missing, or a line is short.
    """
    rows = csv.DictReader(io.StringIO(read_text(place), newline=""))
    try:
        missing = sorted(set(columns) - set(rows.fieldnames or ()))
        if missing:
            raise UserError(
                f"{place} has no column {missing[0]}: it needs {', '.join(sorted(columns))}"
            )
        read = list(rows)
    except csv.Error as error:
        raise UserError(f"{place} is no CSV file: {error}") from None
    for number, row in enumerate(read, 2):
        if any(row[column] is None for column in columns):
            raise UserError(f"{place}, row {number}, has too few columns")
    return read


def read_array(place: str) -> np.ndarray:
    """Reads a .npy file with finite numbers, without pickled objects; returns float [...]."""
    content = io.BytesIO(_read(place, MAX_ARRAY_BYTES))
    try:
        array = np.lib.format.read_array(content, allow_pickle=False)
    except (ValueError, EOFError, MemoryError, SyntaxError, TypeError) as error:
        raise UserError(f"{place} is no .npy file of numbers: {error}") from None
    if array.dtype.kind not in "fiu":
        raise UserError(f"{place} holds {array.dtype}, not numbers: save float32")
    if not np.isfinite(array).all():
        raise UserError(f"{place} holds values that are not finite")
    return array


def read_text(place: str) -> str:
    """Reads a text file in UTF-8."""
    try:
        return _read(place, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not in UTF-8: {error}") from None


def digest(place: str) -> str:
    """Returns the SHA-256 of a file, which identifies the references of a score."""
    return hashlib.sha256(_read(place, MAX_ARRAY_BYTES)).hexdigest()


def _read(place: str, limit: int) -> bytes:
    path = paths.as_path(place)
    try:
        size = paths.version(path).bytes
        if size > limit:
            raise UserError(f"{place} has {size:,} bytes, more than the {limit:,} that are read")
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no file {place}") from None
    except OSError as error:
        raise UserError(f"{place} cannot be read: {error.strerror or error}") from None


def as_list(value: Any, where: str) -> list[Any]:
    """Returns a value that must be a list. Raises UserError."""
    if not isinstance(value, list):
        raise UserError(f"{where} must hold a list, but holds {_kind(value)}")
    return value


def as_dict(value: Any, where: str) -> dict[str, Any]:
    """Returns a value that must be an object. Raises UserError."""
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold an object, but holds {_kind(value)}")
    return value


def field(record: Any, name: str, where: str, *kinds: type) -> Any:
    """Returns a field of a record.

    Args:
      record: an object of the file.
      name: the field's.
      where: how an error names the record.
      kinds: the types that the value may have; true and false are no numbers.

    Raises: UserError if it is missing, of another type, or a text longer than `MAX_TEXT`.
    """
    fields = as_dict(record, where)
    if name not in fields:
        raise UserError(f"{where} has no {name!r}")
    value = fields[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        words = {str: "a text", int: "a whole number", float: "a number", list: "a list"}
        wanted = " or ".join(words[kind] for kind in kinds)
        raise UserError(f"{where} has {name!r} that is {_kind(value)}, not {wanted}")
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise UserError(
            f"{where} has {name!r} of {len(value):,} characters, more than {MAX_TEXT:,}"
        )
    return value


def texts(record: Any, name: str, where: str) -> tuple[str, ...]:
    """Returns a field that must be a list of one text or more. Raises UserError."""
    found = field(record, name, where, list)
    if not found:
        raise UserError(f"{where} has {name!r} that is empty: it needs a text or more")
    return tuple(field({name: one}, name, where, str) for one in found)


def whole_number(row: Mapping[str, str], column: str, where: str) -> int:
    """Returns a cell of a CSV file as a whole number. Raises UserError."""
    try:
        return int(row[column])
    except ValueError:
        raise UserError(f"{where} has a {column} that is no whole number") from None


def number(row: Mapping[str, str], column: str, where: str) -> float:
    """Returns a cell of a CSV file as a finite number. Raises UserError."""
    try:
        value = float(row[column])
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise UserError(f"{where} has a {column} that is no number")
    return value


def by_id(pairs: Iterable[tuple[Any, Any]], where: str) -> dict[Any, Any]:
    """Makes a dictionary of (id, value). Raises UserError if an id comes twice."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UserError(f"{where} has two entries for {str(key)[:80]}: keep one")
        found[key] = value
    return found


def _kind(value: Any) -> str:
    words = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return words.get(type(value), f"{value!r}"[:80])
