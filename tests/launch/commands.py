"""Launch files as modules in the tests' own process."""

import importlib
import types

import pytest
from absl import flags


def load(name: str) -> types.ModuleType:
    """`launch.<name>` with its flags at their defaults; absl forgets them, so that another
    command can define its own of the same names.
    """
    module = importlib.import_module(f"launch.{name}")
    for place, value in list(vars(module).items()):
        if isinstance(value, flags.FlagHolder):
            setattr(module, place, flag(value.default))
            if value.name in flags.FLAGS:
                delattr(flags.FLAGS, value.name)
    return module


def flag(value: object) -> types.SimpleNamespace:
    """What stands in for a parsed flag."""
    return types.SimpleNamespace(value=value)


def run(name: str, **values: object) -> int:
    """Calls the main function of `launch.<name>` with these flags set; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        command = load(name)
        for place, value in values.items():
            patch.setattr(command, place, flag(value))
        return command.main()
