"""Brings a step's metrics to the host, and tells how fast the run was since the line before."""

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
"""A step and what is written of it."""


class MetricsBuffer:
    """Holds each step's metrics back by two steps, so that reading them never makes the host
    wait for the device, and gives those of every `log_every`-th step and of the `last`.

    These lines tell how fast all processes were together since the line before:
    tokens_per_second and images_per_second (each frame of a clip is an image) of what is real
    in the batches, used_token_share (of the tokens that were computed, the part that is no
    padding), flops_per_second (model FLOPs: see `tasks.flops`) and, where `peak`
    (FLOPs a second of all devices) is known, mfu, their share of it. A window holds steps and
    their waiting for data, but nothing that `paused` encloses.
    """

    DELAY = 2

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
        """Tells whether a step's metrics are given."""
        return step % self._log_every == 0 or step == self._last

    def add(self, step: int, metrics: dict[str, Any]) -> list[Line]:
        """Returns the lines that are due; `metrics` are those of `training.run.Run.train_step`."""
        self._pending.append((step, metrics))
        return self._take(1) if len(self._pending) > self.DELAY else []

    def drain(self) -> list[Line]:
        """Waits for all steps that are held back; returns their lines."""
        return self._take(len(self._pending))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the time within out of all speeds; to be entered when nothing is held back."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._last_time += time.monotonic() - began

    def _take(self, count: int) -> list[Line]:
        taken = [self._pending.popleft() for _ in range(count)]
        read = [(step, self._read(step, metrics)) for step, metrics in taken]
        # Steps that are waited for together share the time they took: when each ended is not
        # known.
        now = time.monotonic()
        seconds, self._last_time = (now - self._last_time) / max(count, 1), now
        lines = []
        for step, values in read:
            # Python's integers: a window may hold more tokens than 32 bits count.
            done = (int(number) for number in values.pop("work"))
            self._work = Work(*(a + b for a, b in zip(self._work, done, strict=True)))
            self._computed_tokens += int(values.pop("computed_tokens"))
            self._seconds += seconds
            if self.is_logged(step):
                lines.append((step, values | self._speed()))
                self._work, self._computed_tokens, self._seconds = Work(), 0, 0.0
        return lines

    def _speed(self) -> dict[str, Any]:
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
        """Brings a step's metrics to the host.

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
