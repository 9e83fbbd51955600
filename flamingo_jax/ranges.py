"""Which values a number may have: declared beside the field, as in `layers: Positive = 24`.

`flamingo_jax.configuring` refuses what lies outside. No range holds NaN or an infinity.
"""

import dataclasses
import math
from typing import Annotated

MAX_INT = 2**31 - 1
"""What arrays of int32 hold: positions, counts and sizes are such."""
MAX_SEED = 2**32 - 1
"""jax.random.key takes 32 bits of a seed: larger and negative ones would be others' twins."""

FINITE = "a finite number"


@dataclasses.dataclass(frozen=True)
class Range:
    """From `least` to `most`, without these themselves where they are `open_`."""

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

    def asked_of(self, value: float) -> str:
        """What the value, which is not in the range, must be."""
        if isinstance(value, float) and not math.isfinite(value):
            return "finite" if str(self) == FINITE else f"finite and {self}"
        return f"{MAX_INT} or less" if value > self.most == MAX_INT else str(self)

    def __str__(self) -> str:
        """What a value must be, in words; an upper bound that is the machine's is left out."""
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
Several = Annotated[int, Range(2, MAX_INT)]
"""Tokens of a row: one alone has no next token to learn."""
Seed = Annotated[int, Range(0, MAX_SEED)]
AxisSize = Annotated[int, Range(-1, MAX_INT)]
"""Of a mesh: -1 for all devices that are left."""
Finite = Annotated[float, Range()]
NotNegative = Annotated[float, Range(0)]
AboveZero = Annotated[float, Range(0, open_least=True)]
Fraction = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, open_most=True)]
Shrinking = Annotated[float, Range(0, 1, open_least=True)]
"""A factor that makes smaller, or leaves as it is."""
