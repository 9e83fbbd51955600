"""Reports everything about a run while it trains, in one place: the progress bar,
metrics.jsonl, trackers, goodput, and heartbeats to the run's supervisor.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np

from flamingo_jax.distributed.process_group import ProcessGroup
from flamingo_jax.experiment import Experiment
from flamingo_jax.progress import Bar
from flamingo_jax.tasks.flops import peak_flops, step_cost
from flamingo_jax.training.goodput import Goodput
from flamingo_jax.training.metric_writer import MetricWriter
from flamingo_jax.training.metrics_buffer import Line, MetricsBuffer
from flamingo_jax.training.prefetcher import Prefetcher
from flamingo_jax.training.run import Run
from flamingo_jax.training.trackers import Trackers, describe_run


class Monitor:
    """Reports on the training loop, which calls it in three places: `step` after each step,
    `phase` around all other work, and `record` with what evaluators measured.

    `with Monitor(...) as monitor:` shows the progress bar until `finish_steps` or the end.

    Args:
      run: the run, whose clock and workdir are used.
      prefetcher: for the time spent waiting for data.
      process_group: takes heartbeats.
      began: time.monotonic() when the command began, for goodput.
    """

    def __init__(
        self,
        experiment: Experiment,
        run: Run,
        prefetcher: Prefetcher,
        process_group: ProcessGroup,
        began: float | None = None,
    ):
        primary, training = jax.process_index() == 0, experiment.training
        self._step, self._clock = run.start, run.clock
        self._prefetcher, self._process_group = prefetcher, process_group
        self._seconds_saving = 0.0
        self._writer = MetricWriter(run.workdir, resume_step=run.start, enabled=primary)
        self._trackers = Trackers(
            experiment.trackers if primary else (), describe_run(experiment, run.workdir, run.start)
        )
        self._buffer = MetricsBuffer(
            training.max_not_finite,
            list(experiment.data),
            step_cost(experiment),
            _peak(run.mesh),
            training.log_every,
            training.steps,
        )
        self._goodput = Goodput(run.workdir, run.start, primary, began)
        title = experiment.name or experiment.task
        self._bar = Bar(title, training.steps, start=run.start, enabled=primary)
        self._progress = contextlib.ExitStack()

    def __enter__(self) -> "Monitor":
        self._progress.enter_context(self._bar)
        return self

    @contextlib.contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """Marks work that is no training step: "compile", "evaluate" or "save".

        Buffered metrics are written first: a run that is killed after a save resumes after the
        saved step, and would never write the metrics of the steps before it.
        """
        self._write(self._buffer.drain())
        if kind == "save":
            self._writer.flush()
        waited, began = self._prefetcher.seconds_waiting, time.monotonic()
        self._process_group.heartbeat(self._step, kind, waited)
        with self._goodput.timed(kind), self._buffer.paused():
            yield
        if kind == "save":
            self._seconds_saving += time.monotonic() - began
            self._goodput.record(self._step, waited)
            self._goodput.flush()

    def logs(self, step: int) -> bool:
        """Returns whether a step's metrics are written, so that costly ones are computed only
        then.
        """
        return self._buffer.is_logged(step)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Buffers a step's metrics, still on the devices, and writes those that are due.

        Raises: NotFiniteError where too many steps in a row were not finite.
        """
        self._step = step
        self._process_group.heartbeat(step, "training", self._prefetcher.seconds_waiting)
        self._write(self._buffer.add(step, metrics))

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the values measured at a step to metrics.jsonl and to the trackers."""
        plain = {name: np.asarray(value).tolist() for name, value in values.items()}
        if self._writer.write(step, plain):
            self._trackers.write(step, plain)

    def finish_steps(self) -> None:
        """Writes the buffered metrics and ends the progress bar, after the last step."""
        self._write(self._buffer.drain())
        self._progress.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.ExitStack() as ending:  # One that fails leaves none of the others open.
            for part in (self._writer, self._trackers, self._goodput, self._progress):
                ending.callback(part.close)

    def _write(self, lines: Iterable[Line]) -> None:
        """Records logged steps together with the clocks, and advances the progress bar."""
        for step, values in lines:
            waited = self._prefetcher.seconds_waiting
            clocks = {
                "seconds_waiting": waited,
                "time": self._clock.seconds,
                "seconds_saving": self._seconds_saving,
            }
            self.record(step, values | clocks)
            self._goodput.record(step, waited)
            self._bar.advance(step - self._bar.done, _note(values))


def _note(values: Mapping[str, Any]) -> str:
    """Formats a step's metrics for the progress bar."""
    speed = (
        f"{values['mfu']:.1%} MFU"
        if "mfu" in values
        else f"{values['flops_per_second'] / 1e12:.3g} TFLOP/s"
    )
    return f"loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tokens/s  {speed}"


def _peak(mesh: jax.sharding.Mesh) -> float | None:
    """Returns the peak FLOPs per second of all devices together; None for an unknown kind."""
    peak = peak_flops(mesh.local_devices[0].device_kind)
    return None if peak is None else peak * mesh.size
