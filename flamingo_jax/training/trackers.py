"""Sends a run's metrics to TensorBoard, Weights & Biases or trackio, as `config.trackers`
says.

Trackers are a convenience; the record of a run is `metrics.jsonl`. A tracker that fails is
reported once, its failures are counted, and training continues. To add one, write a class with
the two methods of `Tracker` and a row in `TRACKERS`.
"""

import dataclasses
import functools
import importlib.util
import json
import logging
import pathlib
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from flamingo_jax import paths
from flamingo_jax.configuring import to_json
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment

log = logging.getLogger(__name__)

TENSORBOARD_FLUSH_SECONDS = 30.0
"""The interval at which event files are flushed to disk, or uploaded to a bucket."""
TENSORBOARD_FILE_BYTES = 4 << 20
"""In a bucket, where each upload sends the whole file, a new event file begins at this size."""
WANDB_SECONDS = 30
"""How long init and finish wait for the Weights & Biases server."""
ID_FILE = "tracker_id.json"
"""Holds the run's id for trackers with their own storage, so that a resumed run continues in
the same tracked run.
"""


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """A run as described to a tracker at its start."""

    workdir: pathlib.Path
    project: str
    name: str
    """Display name."""
    config: dict[str, Any]
    """The experiment as JSON-able dicts."""
    resume_step: int
    """The step that this start resumes from."""

    @functools.cached_property
    def id(self) -> str:
        """The run's id, the same at every start: created at the first use and saved in the
        workdir.
        """
        file = self.workdir / ID_FILE
        try:
            return str(json.loads(file.read_text())["id"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            made = secrets.token_hex(4)
        file.write_text(json.dumps({"id": made}) + "\n")
        return made


class Tracker(Protocol):
    """Sends the metrics of one run; used on the first process alone."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs scalars at a step."""

    def close(self) -> None:
        """Flushes what is buffered, and ends."""


class TensorBoard:
    """Writes event files in `<workdir>/tensorboard/`.

    In the calling thread: tensorboardX's SummaryWriter has a thread of its own, which dies
    when the disk is full; the writer then waits for it for ever.
    """

    def __init__(self, run: TrackedRun):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._folder = run.workdir / "tensorboard"
        self._local = self._folder
        if paths.is_bucket(self._folder):
            # tensorboardX's writer for buckets keeps the whole run in memory and uploads all
            # of it each time.
            self._local = pathlib.Path(tempfile.mkdtemp())
        paths.make_folder(self._local)
        self._writer = EventsWriter(str(self._local / "events"))
        # Tells TensorBoard to discard what an earlier start wrote from this step on.
        self._add(run.resume_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._flushed, self._files = time.monotonic(), 0

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._add(step, summary=scalar(name, value))
        if time.monotonic() - self._flushed > TENSORBOARD_FLUSH_SECONDS:
            self._writer.flush()
            self._upload()
            self._flushed = time.monotonic()

    def _upload(self) -> None:
        """Uploads the current event file to a bucket. It grows by some KiB a minute; once it
        is large, a new file is begun.
        """
        if self._local == self._folder:
            return
        (file,) = self._local.iterdir()
        paths.upload(file, self._folder / file.name)
        if file.stat().st_size > TENSORBOARD_FILE_BYTES:
            from tensorboardX.event_file_writer import EventsWriter

            self._writer.close()
            file.unlink()
            self._files += 1
            self._writer = EventsWriter(str(self._local / f"events.{self._files}"))

    def close(self) -> None:
        self._writer.close()
        self._upload()
        if self._local != self._folder:
            paths.remove_folder(self._local)


class WeightsAndBiases:
    """Sends metrics to Weights & Biases, configured by its environment variables.

    Without a network, `WANDB_MODE=offline` stores them in `<workdir>/wandb/` for `wandb sync`.
    The step is logged as a metric of its own, which is the x axis of all charts: wandb ignores
    values whose built-in step was logged before, which a resumed run repeats.
    """

    def __init__(self, run: TrackedRun):
        import wandb

        self._run = wandb.init(
            project=run.project,
            id=run.id,
            name=run.name,
            config=run.config,
            # wandb cannot write its files to a bucket.
            dir=None if paths.is_bucket(run.workdir) else run.workdir,
            resume="allow",
            settings=wandb.Settings(
                # The terminal is the progress bar's, and neither code nor patches leave the
                # machine.
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,
                silent=True,
                # A server that does not answer must not delay start and end for long, where
                # the other processes wait.
                init_timeout=WANDB_SECONDS,
                finish_timeout=WANDB_SECONDS,
            ),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Writes to trackio's local database, in `TRACKIO_DIR` if that is set; `trackio show`
    opens the dashboard. With `TRACKIO_SPACE_ID` it sends to that Hugging Face Space.
    """

    def __init__(self, run: TrackedRun):
        import trackio

        # trackio identifies runs by name, so the name must be unique.
        self._run = trackio.init(
            project=run.project,
            name=f"{run.name}-{run.id}",
            config=run.config,
            resume="allow",
            embed=False,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # "time" is a reserved column of trackio's database.
        renamed = {"seconds" if name == "time" else name: value for name, value in values.items()}
        self._run.log(renamed, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, tuple[Callable[[TrackedRun], Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboardX"),
    "wandb": (WeightsAndBiases, "wandb"),
    "trackio": (Trackio, "trackio"),
}
"""{name in `config.trackers`: (class, package that it needs)}."""


class Trackers:
    """All trackers of a run. An exception in one of them never stops the run."""

    def __init__(self, names: Sequence[str], run: TrackedRun):
        self._trackers: dict[str, Tracker] = {}
        self.failures: dict[str, int] = {}
        """{Name of a tracker: how often it failed}."""
        for name in names:
            self._try(name, lambda name=name: self._start(name, run))  # type: ignore[misc]

    def _start(self, name: str, run: TrackedRun) -> None:
        self._trackers[name] = TRACKERS[name][0](run)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs scalars at a step; elements of a list as name/0, name/1, ..."""
        flat = scalars(values)
        for name, tracker in self._trackers.items():
            self._try(name, lambda tracker=tracker: tracker.write(step, flat))  # type: ignore[misc]

    def close(self) -> None:
        """Closes all trackers, and logs how often each has failed."""
        for name, tracker in self._trackers.items():
            self._try(name, tracker.close)
        for name, count in self.failures.items():
            if count > 1:
                log.warning("the tracker %r failed %d times in all", name, count)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        """Calls a tracker; counts an exception, and logs the first one."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever it is, the run goes on
            self.failures[name] = self.failures.get(name, 0) + 1
            if self.failures[name] == 1:
                log.warning(
                    "the tracker %r failed (%s: %s): the run goes on, metrics.jsonl has all",
                    name,
                    type(error).__name__,
                    next(iter(str(error).splitlines()), ""),
                )


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Flattens {name: number, or list of numbers} to {name, or name/place: number}."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, (int, float)):
            flat[name] = value
        elif isinstance(value, list):
            flat |= {f"{name}/{place}": item for place, item in enumerate(value)}
    return flat


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker whose package is not installed."""
    for name in names:
        package = TRACKERS[name][1]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"config.trackers has {name!r}, but its package is not here: install it with pip"
                f" install 'flamingo_jax[{name}]', or take {name!r} out"
            )


def describe_run(experiment: Experiment, workdir: pathlib.Path, resume_step: int) -> TrackedRun:
    """Describes a run to trackers."""
    return TrackedRun(
        workdir,
        experiment.tracker_project,
        experiment.name or experiment.task,
        to_json(experiment),
        resume_step,
    )
