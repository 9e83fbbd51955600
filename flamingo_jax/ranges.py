"""Ranges of numeric config fields, declared in their types, as in `layers: Positive = 24`.

`flamingo_jax.configuring` rejects values outside. No range contains NaN or infinity.
"""

import dataclasses
import math
from typing import Annotated

MAX_INT = 2**31 - 1
"""The largest int32, in which positions, counts and sizes are stored."""
MAX_SEED = 2**32 - 1
"""jax.random.key uses 32 bits of a seed: larger or negative seeds would equal another one."""

FINITE = "a finite number"


@dataclasses.dataclass(frozen=True)
class Range:
    """The interval from `least` to `most`, both included unless `open_least` or `open_most`."""

    least: float = -math.inf
    most: float = math.inf
    open_least: bool = False
    open_most: bool = False

    def __contains__(self, value: float) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            return False
        above = self.least < value if self.open_least else self.least <= value
        below = value < self.most if self.open_most else value <= self.most
        return above and below

    def requirement(self, value: float) -> str:
        """Describes what a value outside the range must be, for an error message."""
        if isinstance(value, float) and not math.isfinite(value):
            return "finite" if str(self) == FINITE else f"finite and {self}"
        return f"{MAX_INT} or less" if value > self.most == MAX_INT else str(self)

    def __str__(self) -> str:
        """Describes the range in words, without the upper bound of int32."""
        least, most = _written(self.least), _written(self.most)
        lower = f"above {least}" if self.open_least else f"{least} or more"
        upper = f"below {most}" if self.open_most else f"{most} or less"
        if self.least == -math.inf:
            return FINITE if self.most == math.inf else upper
        if self.most in (math.inf, MAX_INT):
            return lower
        if self.open_least or self.open_most:
            return f"{lower} and {upper}"
        return f"from {least} to {most}"


def _written(value: float) -> str:
    return str(int(value)) if math.isfinite(value) and value == int(value) else str(value)


Count = Annotated[int, Range(0, MAX_INT)]
Positive = Annotated[int, Range(1, MAX_INT)]
AtLeastTwo = Annotated[int, Range(2, MAX_INT)]
"""Of token counts of a row: a single token has no next token to predict."""
Seed = Annotated[int, Range(0, MAX_SEED)]
AxisSize = Annotated[int, Range(-1, MAX_INT)]
"""Of a mesh axis: -1 for all remaining devices."""
Finite = Annotated[float, Range()]
NotNegative = Annotated[float, Range(0)]
AboveZero = Annotated[float, Range(0, open_least=True)]
Fraction = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, open_most=True)]
PositiveFraction = Annotated[float, Range(0, 1, open_least=True)]
"""A factor above 0 and at most 1."""
