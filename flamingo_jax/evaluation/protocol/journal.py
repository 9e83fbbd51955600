"""Keeps predictions as they are made, so that a killed run goes on where it was.

line 1     what the predictions are of: {"format", "protocol", ...}
line 2...  one prediction each
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_jax import json_lines, paths
from flamingo_jax.errors import UserError

FORMAT = 1


class Journal:
    """Predictions that are kept nowhere; the interface of those that are."""

    def earlier(self) -> list[dict[str, Any]]:
        """Returns the predictions of an earlier run, as `Prediction.to_json` has them."""
        return []

    def append(self, predictions: Sequence[Mapping[str, Any]]) -> None:
        """Keeps predictions; when it returns, they are not lost if the process is killed."""


NOT_KEPT = Journal()


class JournalFile(Journal):
    """Predictions in a file of JSON lines.

    file: is made, or continued where it has predictions of the same `about`.
    about: what the predictions depend on, as JSON can hold it.
    writes: False for all but the first of several processes, which read the file only.

    Raises: UserError where the file holds predictions of something else.
    """

    def __init__(self, file: pathlib.Path, about: Mapping[str, Any], *, writes: bool = True):
        self._file = file
        header = {"format": FORMAT, **about}
        # Through JSON, so that tuples equal lists.
        header = json.loads(json.dumps(header))
        lines = json_lines.read_lines(file)
        if lines and lines[0] != header:
            differing = [name for name in header if lines[0].get(name) != header[name]]
            raise UserError(
                f"{file} holds predictions of another {', '.join(differing) or 'run'}: remove it, "
                "or name another --output"
            )
        self._earlier = lines[1:]
        self._lines: json_lines.LineWriter | None = None
        if writes:
            paths.make_folder(file.parent)
            self._lines = json_lines.reopen(file, [header, *self._earlier])

    def earlier(self) -> list[dict[str, Any]]:
        """Returns the predictions that the file had."""
        return self._earlier

    def append(self, predictions: Sequence[Mapping[str, Any]]) -> None:
        """Writes predictions to the file."""
        if self._lines is not None:
            for one in predictions:
                self._lines.write(json.dumps(one, ensure_ascii=False) + "\n")
            self._lines.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._lines is not None:
            self._lines.close()


def read_journal(file: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Reads what a file's predictions are of, and the predictions.

    Raises: UserError where there is no such file or it is of another form.
    """
    lines = json_lines.read_lines(file)
    if not lines or lines[0].get("format") != FORMAT:
        raise UserError(
            f"{file} holds no predictions: name a file that launch.evaluate wrote to predictions/"
        )
    return lines[0], lines[1:]
