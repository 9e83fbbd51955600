"""Reads JSON files of published models, such as config.json, and checks every value: they were
not written by this project.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from flamingo_jax.checkpointing import manifest
from flamingo_jax.errors import UserError

CONFIG = "config.json"


class Document:
    """Reads checked values from a JSON object in a model's folder.

    Every method raises a UserError that names the file and the key.
    """

    def __init__(self, file: pathlib.Path, content: Mapping[str, Any]):
        self.file, self._content = file, content

    @classmethod
    def read(cls, file: pathlib.Path) -> "Document":
        """Reads a JSON file. Raises StorageError when it cannot be read at the moment."""
        try:
            content = json.loads(manifest.retry_read(file.read_bytes))
        except FileNotFoundError:
            raise UserError(
                f"there is no {file}: name the folder of a model as Hugging Face's transformers"
                " save it"
            ) from None
        except OSError as error:
            raise manifest.unreadable(file, error) from error
        except ValueError as error:
            raise UserError(f"{file} is no JSON document ({error}): copy it again") from error
        if not isinstance(content, dict):
            raise UserError(f"{file} is no JSON object: copy it again")
        return cls(file, content)

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def given(self, key: str) -> Any:
        """Returns the value of a key, None if it is absent or null."""
        return self._content.get(key)

    def has(self, key: str) -> bool:
        """Returns whether the key is present, even if its value is null."""
        return key in self._content

    def inside(self, key: str) -> "Document":
        """Returns the object at a key, an empty one if it is absent."""
        value = self.given(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "an object")
        return Document(self.file, value or {})

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Returns an integer of at least `least`. default: the value to use if the key is
        absent.
        """
        value = self.given(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.refuse(key, f"a whole number of {least} or more")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a number. default: the value to use if the key is absent."""
        value = self.given(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.refuse(key, "a number")
        return float(value)

    def choice(self, key: str, choices: Mapping[Any, Any], default: Any) -> Any:
        """Returns `choices[value]`. default: the value to use if the key is absent."""
        value = self.given(key)
        value = default if value is None else value
        if not isinstance(value, str) or value not in choices:
            self.refuse(key, f"one of {', '.join(map(repr, choices))}")
        return choices[value]

    def require(self, key: str, *allowed: Any) -> None:
        """Requires that a key is absent or has one of these values; without values, that it is
        absent.
        """
        value = self.given(key)
        if value is not None and value not in allowed:
            self.refuse(key, " or ".join(map(repr, allowed)) or "models without it")

    def refuse(self, key: str, wanted: str) -> NoReturn:
        """Raises a UserError: the value of `key` is not `wanted`."""
        value = self.given(key)
        shown = repr(value) if len(repr(value)) < 80 else repr(value)[:77] + "..."
        said = f"has no {key}" if value is None else f"has {key} = {shown}"
        raise UserError(
            f"{self.file} {said}, but only {wanted} can be read here: take another model"
        )
