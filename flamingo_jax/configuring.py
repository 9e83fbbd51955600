"""Converts between the config dataclasses of `flamingo_jax.experiment`, ml_collections
ConfigDicts and JSON.

The dataclasses are the only schema: a ConfigDict or a JSON document is checked against them
when it is converted, and a mistake is a UserError that names the key, what was expected, and
the closest name.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from flamingo_jax import renamed
from flamingo_jax.errors import UserError
from flamingo_jax.ranges import Range

if TYPE_CHECKING:
    import ml_collections

T = TypeVar("T")


def to_config(value: Any) -> "ml_collections.ConfigDict":
    """Converts a dataclass, with nested ones, to a ConfigDict. None and tuples stay as they
    are; ints in float fields become floats.
    """
    # Imported here: a machine that only runs the device check need not have it.
    import ml_collections

    return ml_collections.ConfigDict(
        dataclasses.asdict(from_config(type(value), dataclasses.asdict(value)))
    )


def from_config(cls: type[T], config: Mapping[str, Any], name: str = "config") -> T:
    """Converts a ConfigDict (or any mapping) to the dataclass; missing keys keep their
    defaults.

    name: of the whole config, for messages.
    Raises: UserError for an unknown key (with the closest one), a value of the wrong type
      (with the one expected) or a number outside its declared range.
    """
    return _build(cls, config, name, stored=False)


def to_json(value: Any) -> dict[str, Any]:
    """Converts a dataclass to JSON-able dicts and lists; `from_json` is the inverse."""
    return _plain(dataclasses.asdict(value))


def _is_mapping(value: Any) -> bool:
    """Returns whether a value is a mapping, as a ConfigDict is without being one by type."""
    module = sys.modules.get("ml_collections")
    return isinstance(value, Mapping) or (
        module is not None and isinstance(value, module.ConfigDict)
    )


def from_json(cls: type[T], document: Mapping[str, Any], name: str = "config") -> T:
    """Converts a parsed JSON document to the dataclass, with the checks of `from_config`.

    Fields that had another name when the document was written are accepted (see `renamed`).
    """
    return _build(cls, document, name, stored=True)


def flatten(document: Mapping[str, Any], name: str = "config") -> dict[str, Any]:
    """Flattens a config's JSON-able form to {dotted key: value}; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.{key}")
        else:
            flat[f"{name}.{key}"] = value
    return flat


def key_type(cls: type, key: str, config: Mapping[str, Any], name: str = "config") -> Any:
    """Returns the declared type of the dotted `key`, such as "data.m3w.weight".

    Raises: UserError where the schema or `config` has no such key.
    """
    kind: Any = cls
    value: Any = config
    for part in key.split("."):
        if value is None:
            raise UserError(
                f"{name} is None here, so that {name}.{part} cannot be set: choose a config"
                f" that has {name}"
            )
        kind = _without_none(kind)
        if dataclasses.is_dataclass(kind):
            fields = typing.get_type_hints(kind)
            known: Iterable[str] = fields
        elif typing.get_origin(kind) is dict:
            fields = dict.fromkeys(value, typing.get_args(kind)[1])
            known = value
        else:
            raise UserError(f"{name} is {describe(kind)} and has no key {part!r}")
        if part not in fields:
            old = renamed.old_name_error(getattr(kind, "__name__", ""), part, None, name)
            raise UserError(old or _unknown_key(name, part, known))
        kind, value, name = fields[part], value[part], f"{name}.{part}"
    return kind


def described_keys(
    cls: type, config: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, Any, str]]:
    """Yields each key of a config, in declared order, with its documentation: (dotted key,
    value, first sentence).

    config: as nested dicts; without one, the keys of the schema are yielded with their
      defaults, those of a dict of datasets once, under NAME.
    """
    sentences = _field_sentences(cls)
    for field in dataclasses.fields(cls):
        kind = _without_none(typing.get_type_hints(cls)[field.name])
        default = _default(field)
        value = default if config is None else config[field.name]
        inner = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None
        if dataclasses.is_dataclass(kind) and (config is None or value is not None):
            parts: dict[str, Any] = {field.name: (kind, None if config is None else value)}
        elif dataclasses.is_dataclass(inner):
            parts = (
                {f"{field.name}.NAME": (inner, None)}
                if config is None
                else {f"{field.name}.{name}": (inner, each) for name, each in value.items()}
            )
        else:
            yield field.name, value, sentences.get(field.name, "")
            continue
        for name, (part, given) in parts.items():
            for key, each, sentence in described_keys(part, given):
                yield f"{name}.{key}", each, sentence


def _default(field: dataclasses.Field) -> Any:  # type: ignore[type-arg]
    if field.default is not dataclasses.MISSING:
        return field.default
    made = field.default_factory
    return None if made is dataclasses.MISSING else made()


@functools.cache
def _field_sentences(cls: type) -> dict[str, str]:
    """Reads the first sentence of the docstring below each field of a dataclass, from source."""
    (declared,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(declared, ast.ClassDef)
    sentences = {}
    for field, after in itertools.pairwise(declared.body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            text = " ".join(str(after.value.value).split())
            sentences[field.target.id] = re.split(r"(?<=\.)\s+(?=[A-Z])", text)[0]
    return sentences


def did_you_mean(wrong: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns ", did you mean x or y?" with the names closest to `wrong`; "" if none is close."""
    close = difflib.get_close_matches(wrong, list(known), n=3, cutoff=0.5)
    return f", did you mean {' or '.join(prefix + name for name in close)}?" if close else ""


def describe(kind: Any) -> str:
    """Describes a declared type in words: "an int", "one of 'last', 'all_previous'", "a tuple
    of strings".
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return describe(arguments[0])
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(a) for a in arguments)
    if origin is tuple:
        if typing.get_origin(arguments[0]) is typing.Literal:
            return f"a tuple of {' or '.join(map(repr, typing.get_args(arguments[0])))}"
        return f"a tuple of {describe(arguments[0]).split(' ', 1)[1]}s"
    if origin is dict:
        return f"a dict of {describe(arguments[1]).split(' ', 1)[1]}s by name"
    words = {
        int: "an int",
        float: "a float",
        bool: "a bool",
        str: "a string",
        types.NoneType: "None",
    }
    name = getattr(kind, "__name__", str(kind))
    return words.get(kind, f"{'an' if name[0] in 'AEIOU' else 'a'} {name}")


def _build(kind: Any, value: Any, name: str, stored: bool) -> Any:
    """Converts `value` to the declared type `kind`. stored: it may have old names of fields.

    Raises: UserError where it does not fit.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _within(arguments[1], _build(arguments[0], value, name, stored), name)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _build(_without_none(kind), value, name, stored)
    if dataclasses.is_dataclass(kind) and _is_mapping(value):
        hints = typing.get_type_hints(kind, include_extras=True)
        if stored:
            value = renamed.with_new_names(kind.__name__, value)  # type: ignore[union-attr]
        for key in value:
            if old := renamed.old_name_error(kind.__name__, key, value[key], name):  # type: ignore[union-attr]
                raise UserError(old)
            if key not in hints:
                raise UserError(_unknown_key(name, key, hints))
        built = {key: _build(hints[key], value[key], f"{name}.{key}", stored) for key in value}
        return kind(**built)  # type: ignore[operator]
    if origin is dict and _is_mapping(value):
        return {key: _build(arguments[1], value[key], f"{name}.{key}", stored) for key in value}
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(
            _build(arguments[0], item, f"{name}[{place}]", stored)
            for place, item in enumerate(value)
        )
    # An int is accepted as a float (bool is an int to Python, but not here).
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise UserError(f"{name} is {value}, which no float holds") from error
    if kind in (int, bool, str) and type(value) is kind:
        return value
    if origin is typing.Literal and value in arguments:
        return value
    raise UserError(f"{name} is {value!r}, but must be {describe(kind)}")


def _within(range_: Range, value: float, name: str) -> float:
    if value not in range_:
        raise UserError(f"{name} is {value!r}, but must be {range_.requirement(value)}")
    return value


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) not in (types.UnionType, typing.Union):
        return kind
    (inner,) = (a for a in typing.get_args(kind) if a is not types.NoneType)
    return inner


def _unknown_key(name: str, key: str, known: Iterable[str]) -> str:
    known = sorted(known)
    return f"{name} has no key {key!r}" + (
        did_you_mean(key, known) or f": it has {', '.join(known)}"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
