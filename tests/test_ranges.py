"""Every number of the schema has a range, and what lies outside is refused in one sentence."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from absl import flags

from flamingo_jax.configuring import from_json
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.ranges import MAX_INT, BelowOne, Finite, PositiveFraction, Range
from launch import command

NAN, INF = float("nan"), float("inf")


def numbers(kind: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every int and float of a declared type, with its range around it where it has one."""
    arguments = typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        for field, declared in typing.get_type_hints(kind, include_extras=True).items():
            yield from numbers(declared, f"{name}.{field}")
    elif typing.get_origin(kind) is typing.Annotated or kind in (int, float):
        yield name, kind
    elif typing.get_origin(kind) is not typing.Literal:
        for argument in arguments:
            yield from numbers(argument, name)


def test_every_number_of_the_schema_has_a_range() -> None:
    found = dict(numbers(Experiment, "config"))
    assert len(found) > 80 and "config.optimizer.boundaries" in found
    assert [name for name, kind in found.items() if kind in (int, float)] == []


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("seed", 2**64, "is 18446744073709551616, but must be from 0 to 4294967295"),
        ("seed", -1, "is -1, but must be from 0 to 4294967295"),
        ("data.text.max_length", 1, "is 1, but must be 2 or more"),
        ("optimizer.learning_rate", -1, "is -1.0, but must be 0 or more"),
        ("optimizer.learning_rate", NAN, "is nan, but must be finite and 0 or more"),
        ("optimizer.beta2", 1, "is 1.0, but must be 0 or more and below 1"),
        ("optimizer.boundary_factor", 0, "is 0.0, but must be above 0 and 1 or less"),
        ("optimizer.boundaries", [3, 0], "[1] is 0, but must be 1 or more"),
        ("data.text.weight", INF, "is inf, but must be finite and 0 or more"),
        ("held_out.text.p_next", 1.5, "is 1.5, but must be from 0 to 1"),
        ("training.required_loss.text", -INF, "is -inf, but must be finite and above 0"),
        ("training.steps", 10**30, f"is {10**30}, but must be {MAX_INT} or less"),
        ("flamingo.conditioning.gate_init", NAN, "is nan, but must be finite"),
        ("flamingo.vision.std", [0.2, 0, 0.2], "[1] is 0.0, but must be above 0"),
        ("optimizer.eps", 10**400, "which no float holds"),
    ],
)
def test_a_number_outside_its_range_is_one_sentence(key: str, value: Any, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        from_json(Experiment, nested(key, value))
    assert f"config.{key}" in str(error.value) and sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_no_number_of_the_schema_may_be_nan_or_infinite() -> None:
    for name, kind in numbers(Experiment, "config"):
        base, range_ = typing.get_args(kind)
        assert base in (int, float) and not any(value in range_ for value in (NAN, INF, -INF)), name


def test_bounds_belong_to_their_ranges_unless_they_are_open() -> None:
    (_, below), (_, shrinking), (_, finite) = map(
        typing.get_args, (BelowOne, PositiveFraction, Finite)
    )
    assert 0.0 in below and 1.0 not in below and 1.0 in shrinking and 0.0 not in shrinking
    assert -1e300 in finite
    assert str(Range(0.5, 2)) == "from 0.5 to 2" and str(Range(most=3)) == "3 or less"


def test_flags_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*arguments: str) -> float:
        values = flags.FlagValues()
        flags.DEFINE_float("rate", 1.0, "", lower_bound=0.0, flag_values=values)
        flags.DEFINE_integer("count", 1, "", flag_values=values)
        flags.DEFINE_string("name", "nan", "", flag_values=values)
        monkeypatch.setattr(command.flags, "FLAGS", values)
        command._parse(["program", *arguments])
        return values["rate"].value

    for argument, sentence in (
        ("--rate=nan", "--rate=nan is no finite number"),
        ("--rate=inf", "--rate=inf is no finite number"),
        ("--count=1000000000000", "--count=1000000000000 is out of bounds"),
        ("--count=-1000000000000", "--count=-1000000000000 is out of bounds"),
        ("--rate=-1", "--rate=-1"),
    ):
        with pytest.raises(UserError, match=sentence):
            parse(argument)
    assert parse("--rate=0.5", "--count=7") == 0.5
