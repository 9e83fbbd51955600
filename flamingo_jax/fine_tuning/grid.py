"""Grids of hyper-parameters: parses --grid=KEY=VALUE,..., and makes each cell's experiment."""

import dataclasses
import itertools
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flamingo_jax import configuring
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import DatasetConfig, Experiment

Value = int | float | bool | str
DEFAULT = "default"
"""The name of the only cell where nothing varies."""


class Axis(NamedTuple):
    """A hyper-parameter and the values that are tried."""

    key: str
    values: tuple[Value, ...]


class Cell(NamedTuple):
    """One point of a grid."""

    settings: Mapping[str, Value]
    """{key: value}."""
    experiment: Experiment

    @property
    def name(self) -> str:
        """Names the cell by its settings in the order of their keys, so that its folder is found
        again after values have been added to the grid.
        """
        parts = (f"{key}={written(self.settings[key])}" for key in sorted(self.settings))
        return re.sub(r"[^\w=.,+-]", "_", ",".join(parts)) or DEFAULT


def _augmented(experiment: Experiment, strength: Any) -> Experiment:
    """Sets colour augmentation, and flips with any strength above 0: the paper turns both on or
    off together (B.2.2).
    """
    return _of_data(experiment, colour=strength, flip=strength > 0)


def _with_steps(experiment: Experiment, steps: Any) -> Experiment:
    """Sets the length of the run. The schedule keeps its form: warmup and boundaries are at the
    same fractions of it.
    """
    training, optimizer = experiment.training, experiment.optimizer
    factor = steps / training.steps
    boundaries = {min(max(1, round(step * factor)), steps - 1) for step in optimizer.boundaries}
    return dataclasses.replace(
        experiment,
        training=dataclasses.replace(training, steps=steps),
        optimizer=dataclasses.replace(
            optimizer,
            warmup_steps=round(optimizer.warmup_steps * factor),
            boundaries=tuple(sorted(boundaries)),
        ),
    )


def _of_data(experiment: Experiment, **changes: Any) -> Experiment:
    """Changes the config of each training dataset."""
    data: dict[str, DatasetConfig] = {
        name: dataclasses.replace(each, **changes) for name, each in experiment.data.items()
    }
    return dataclasses.replace(experiment, data=data)


SHORT: dict[str, tuple[type, str | Callable[[Experiment, Any], Experiment]]] = {
    "steps": (int, _with_steps),
    "learning_rate": (float, "optimizer.learning_rate"),
    "batch_size": (int, lambda experiment, size: _of_data(experiment, batch_size=size)),
    "augmentation": (float, _augmented),
    "image_size": (int, "flamingo.vision.image_size"),
    "unfreeze_encoder": (bool, "training.unfreeze_vision_encoder"),
}
"""{key of a grid: (its type, the config key that it stands for, or what sets it)}, in the order
in which they are applied.
"""


def parse_grid(texts: Sequence[str], experiment: Experiment) -> list[Axis]:
    """Parses the values of --grid, such as "learning_rate=1e-5,3e-5".

    Args:
      texts: one for each axis.
      experiment: what the cells vary; a key is one of SHORT or of its config.

    Raises: UserError for an unknown key, a value of another type, and an axis or a value that is
      given twice.
    """
    axes: list[Axis] = []
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise UserError(f"--grid={text} must be KEY=VALUE,..., as in learning_rate=1e-5,3e-5")
        if key in (axis.key for axis in axes):
            raise UserError(f"--grid={key} is given twice: write all of its values in one")
        parsed = tuple(_value(text, _type_of(key, experiment), v) for v in values.split(","))
        if len(set(parsed)) < len(parsed):
            raise UserError(f"--grid={text} has a value twice: leave one of them out")
        axes.append(Axis(key, parsed))
    return axes


def cells(axes: Sequence[Axis], experiment: Experiment) -> list[Cell]:
    """Makes all cells, the last axis varying fastest.

    Raises: UserError for a value outside of its range.
    """
    order = {key: place for place, key in enumerate(SHORT)}
    keys = sorted((axis.key for axis in axes), key=lambda key: order.get(key, len(order)))
    found = []
    for values in itertools.product(*(axis.values for axis in axes)):
        settings = dict(zip((axis.key for axis in axes), values, strict=True))
        made = experiment
        for key in keys:
            made = apply(made, key, settings[key])
        # Checks ranges, which `dataclasses.replace` does not.
        made = configuring.from_json(Experiment, configuring.to_json(made))
        found.append(Cell(settings, made))
    return found


def apply(experiment: Experiment, key: str, value: Value) -> Experiment:
    """Returns the experiment with one setting of a grid."""
    _, target = SHORT.get(key, (None, key))
    if callable(target):
        return target(experiment, value)
    document = configuring.to_json(experiment)
    *path, last = target.split(".")
    inner = document
    for part in path:
        inner = inner[part]
    inner[last] = value
    return configuring.from_json(Experiment, document)


def written(value: Value) -> str:
    """Writes a value as it is read: 1e-05, true."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type_of(key: str, experiment: Experiment) -> Any:
    """Returns the type of a key's values. Raises UserError for an unknown key."""
    if key in SHORT:
        return SHORT[key][0]
    if "." not in key:
        raise UserError(
            f"--grid={key}: there is no such key"
            f"{configuring.did_you_mean(key, SHORT) or ';'} a grid varies {', '.join(SHORT)} or"
            " any key of the config, such as optimizer.weight_decay"
        )
    kind = configuring.key_type(Experiment, key, configuring.to_json(experiment))
    if kind not in (int, float, bool, str) and typing.get_origin(kind) is not typing.Literal:
        raise UserError(
            f"--grid={key}: this is {configuring.describe(kind)}, but a grid varies single"
            " numbers and names: set it in the config"
        )
    return kind


def _value(text: str, kind: Any, value: str) -> Value:
    """Converts a value's text to its type. Raises UserError where it has none."""
    if kind is bool:
        if value in ("true", "false"):
            return value == "true"
        raise UserError(f"--grid={text}: {value!r} must be true or false")
    if kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            raise UserError(
                f"--grid={text}: {value!r} must be {configuring.describe(kind)}"
            ) from None
    return value
