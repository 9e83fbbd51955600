"""A step's metrics on the host, and how fast it was."""

import collections
import time
from typing import Any

import jax
import numpy as np

from flamingo_jax.errors import NotFiniteError
from flamingo_jax.planning.flops import Cost, Work


class Meter:
    """Holds each step's metrics back by two steps, so that reading them never makes the host wait for the device.

    Adds how fast this process and its devices are: tokens_per_second, flops_per_second (model FLOPs: see `planning.flops`) and, where `peak`
    (FLOPs a second) is known, mfu, their share of it.
    """

    BEHIND = 2

    def __init__(self, max_not_finite: int, datasets: list[str], cost: Cost, peak: float | None):
        self._pending: collections.deque[tuple[int, dict[str, Any], Work]] = collections.deque()
        self._max, self._datasets, self._cost, self._peak = max_not_finite, datasets, cost, peak
        self._last_time = time.monotonic()

    def add(self, step: int, metrics: dict[str, Any], work: Work) -> list[tuple[int, dict[str, Any]]]:
        self._pending.append((step, metrics, work))
        return self._take(1) if len(self._pending) > self.BEHIND else []

    def drain(self) -> list[tuple[int, dict[str, Any]]]:
        return self._take(len(self._pending))

    def _take(self, count: int) -> list[tuple[int, dict[str, Any]]]:
        taken = [self._pending.popleft() for _ in range(count)]
        read = [self._read(step, metrics) for step, metrics, _ in taken]
        # Steps that are waited for together share the time they took: when each ended is not known.
        now = time.monotonic()
        seconds, self._last_time = max((now - self._last_time) / max(count, 1), 1e-9), now
        for values, (_, _, work) in zip(read, taken, strict=True):
            values |= {"tokens_per_second": np.asarray(work.tokens / seconds), "flops_per_second": np.asarray(self._cost.of(work) / seconds)}
            if self._peak is not None:
                values["mfu"] = values["flops_per_second"] / self._peak
        return [(step, values) for values, (step, _, _) in zip(read, taken, strict=True)]

    def _read(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """A step's metrics on the host. Raises NotFiniteError where too many steps in a row were not finite."""
        values = {name: np.asarray(value) for name, value in jax.device_get(metrics).items()}
        if int(values["skipped_in_a_row"]) > self._max:
            guilty = [name for name in self._datasets if not values[f"finite/{name}"]]
            culprit = f"the loss of {' and '.join(guilty)}" if guilty else "the gradient"
            raise NotFiniteError(
                f"stopped at step {step}: {culprit} was not finite, {values['skipped_in_a_row']} steps in a row "
                f"(config.training.max_not_finite is {self._max}); the last checkpoint is whole"
            )
        return {name: value for name, value in values.items() if not name.startswith("finite/")}
