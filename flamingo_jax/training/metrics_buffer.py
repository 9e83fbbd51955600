"""Fetches metrics from the devices without stalling them, and computes throughput and MFU."""

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from flamingo_jax.errors import NotFiniteError
from flamingo_jax.tasks.flops import Cost, Work

Line = tuple[int, dict[str, Any]]
"""A step, and its metrics as written to metrics.jsonl."""


class MetricsBuffer:
    """Delays each step's metrics by two steps, so that fetching them does not make the host
    wait for the devices, and returns those of every `log_every`-th step and of the `last`.

    To these it adds throughputs, totals over all processes since the previous line, including
    the time waiting for data, but not the time inside `paused`:
      tokens_per_second, images_per_second: real ones, not padding; each frame of a clip is an
        image.
      used_token_share: the share of all computed tokens that are not padding.
      flops_per_second: model FLOPs, see `tasks.flops`.
      mfu: their share of `peak`, where it is known.

    Args:
      max_not_finite: how many steps in a row may be skipped.
      datasets: their names.
      cost: FLOPs of an update.
      peak: FLOPs per second of all devices; None where unknown.
    """

    DELAY = 2
    """Steps that are dispatched but not yet read."""

    def __init__(
        self,
        max_not_finite: int,
        datasets: list[str],
        cost: Cost,
        peak: float | None,
        log_every: int = 1,
        last: int = 0,
    ):
        self._pending: collections.deque[Line] = collections.deque()
        self._max, self._datasets, self._cost, self._peak = max_not_finite, datasets, cost, peak
        self._log_every, self._last = log_every, last
        self._work, self._computed_tokens, self._seconds = Work(), 0, 0.0
        self._last_time = time.monotonic()

    def is_logged(self, step: int) -> bool:
        """Returns whether a step's metrics are written."""
        return step % self._log_every == 0 or step == self._last

    def add(self, step: int, metrics: dict[str, Any]) -> list[Line]:
        """Buffers a step's metrics (of `Run.train_step`) and returns the lines that are due."""
        self._pending.append((step, metrics))
        return self._take(1) if len(self._pending) > self.DELAY else []

    def drain(self) -> list[Line]:
        """Waits for all buffered steps and returns their lines."""
        return self._take(len(self._pending))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside from all throughputs. Call `drain` first."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._last_time += time.monotonic() - began

    def _take(self, count: int) -> list[Line]:
        """Fetches the oldest `count` steps and returns the lines of those that are logged."""
        taken = [self._pending.popleft() for _ in range(count)]
        read = [(step, self._read(step, metrics)) for step, metrics in taken]
        # Steps that are fetched together get equal shares of their time: when each of them
        # ended is not known.
        now = time.monotonic()
        seconds, self._last_time = (now - self._last_time) / max(count, 1), now
        lines = []
        for step, values in read:
            # Summed as Python integers: a window may have more tokens than int32 can count.
            done = (int(number) for number in values.pop("work"))
            self._work = Work(*(a + b for a, b in zip(self._work, done, strict=True)))
            self._computed_tokens += int(values.pop("computed_tokens"))
            self._seconds += seconds
            if self.is_logged(step):
                lines.append((step, values | self._speed()))
                self._work, self._computed_tokens, self._seconds = Work(), 0, 0.0
        return lines

    def _speed(self) -> dict[str, Any]:
        """Computes the throughputs since the previous line."""
        work, seconds = self._work, max(self._seconds, 1e-9)
        speed = {
            "tokens_per_second": work.tokens / seconds,
            "images_per_second": work.frames / seconds,
            "used_token_share": work.tokens / max(self._computed_tokens, 1),
            "flops_per_second": self._cost.of(work) / seconds,
        }
        if self._peak is not None:
            speed["mfu"] = speed["flops_per_second"] / self._peak
        return speed

    def _read(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """Fetches a step's metrics to the host.

        Raises: NotFiniteError where too many steps in a row were not finite.
        """
        values = {name: np.asarray(value) for name, value in jax.device_get(metrics).items()}
        if int(values["skipped_in_a_row"]) > self._max:
            guilty = [name for name in self._datasets if not values[f"finite/{name}"]]
            culprit = f"the loss of {' and '.join(guilty)}" if guilty else "the gradient"
            raise NotFiniteError(
                f"stopped at step {step}: {culprit} was not finite,"
                f" {values['skipped_in_a_row']} steps in a row (config.training.max_not_finite"
                f" is {self._max}); the last checkpoint is whole"
            )
        return {name: value for name, value in values.items() if not name.startswith("finite/")}
