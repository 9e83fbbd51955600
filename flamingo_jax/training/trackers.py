"""Shows a run's metrics in TensorBoard, Weights & Biases or trackio, as `config.trackers` says.

A tracker is a convenience: `metrics.jsonl` is what a run goes on from and what is compared. So a
tracker that fails is told of once and counted, and the run goes on. To add one, write a class
with the two methods of `Tracker` and a row in `TRACKERS`.
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
"""Between what TensorBoard is shown: its file is brought to the disk each time."""
TENSORBOARD_FILE_BYTES = 4 << 20
"""In a bucket a file that is larger is not written on."""
WANDB_SECONDS = 30
"""For which a start and an end wait for its server."""
ID_FILE = "tracker_id.json"
"""Names the run to trackers that keep runs elsewhere, so that a later start goes on in the same
one."""


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """Holds what a tracker is told of a run when it starts."""

    workdir: pathlib.Path
    project: str
    name: str
    """For people."""
    config: dict[str, Any]
    """The experiment as JSON-able dicts."""
    resume_step: int
    """The step that this start goes on from."""

    @functools.cached_property
    def id(self) -> str:
        """Names the run, the same at every start; made, and kept in its folder, when it is first
        asked for.
        """
        file = self.workdir / ID_FILE
        try:
            return str(json.loads(file.read_text())["id"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            made = secrets.token_hex(4)
        file.write_text(json.dumps({"id": made}) + "\n")
        return made


class Tracker(Protocol):
    """Shows metrics of one run; made and called by the first process alone."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Shows scalars at a step."""

    def close(self) -> None:
        """Hands over what is held back."""


class TensorBoard:
    """Writes `<workdir>/tensorboard/`, from the thread that calls.

    The library's own SummaryWriter has a thread for it, which dies of a full disk, and waits for
    it for ever after.
    """

    def __init__(self, run: TrackedRun):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._folder = run.workdir / "tensorboard"
        self._local = self._folder
        if paths.is_bucket(self._folder):
            # Its own writer for buckets keeps a whole run in memory and sends all of it each time.
            self._local = pathlib.Path(tempfile.mkdtemp())
        paths.make_folder(self._local)
        self._writer = EventsWriter(str(self._local / "events"))
        # What an earlier start wrote from that step on is not shown.
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
        """Brings the event file to a bucket: one of a start, which grows by some KiB a minute;
        once it is large, another one goes on.
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
    """Sends metrics to Weights & Biases, as its own environment variables say.

    Without network `WANDB_MODE=offline` keeps them in `<workdir>/wandb/` for `wandb sync`. Steps
    are a metric of their own, by which charts are drawn: of its built-in one wandb leaves out all
    that a killed run repeats.
    """

    def __init__(self, run: TrackedRun):
        import wandb

        self._run = wandb.init(
            project=run.project,
            id=run.id,
            name=run.name,
            config=run.config,
            # In a bucket it has no files of its own.
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
                # A server that does not answer holds up neither the start nor the end: other
                # processes wait there.
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
    """Writes to trackio's local database, in `TRACKIO_DIR` if that is set; `trackio show` draws
    it. With `TRACKIO_SPACE_ID` it sends to that Space.
    """

    def __init__(self, run: TrackedRun):
        import trackio

        # It knows runs by their names.
        self._run = trackio.init(
            project=run.project,
            name=f"{run.name}-{run.id}",
            config=run.config,
            resume="allow",
            embed=False,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # "time" is the database's own.
        renamed = {"seconds" if name == "time" else name: value for name, value in values.items()}
        self._run.log(renamed, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, tuple[Callable[[TrackedRun], Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboardX"),
    "wandb": (WeightsAndBiases, "wandb"),
    "trackio": (Trackio, "trackio"),
}
"""{Name in `config.trackers`: (what makes it, the package that it needs)}."""


class Trackers:
    """Calls all trackers of a run; none of them can end it."""

    def __init__(self, names: Sequence[str], run: TrackedRun):
        self._trackers: dict[str, Tracker] = {}
        self.failures: dict[str, int] = {}
        """{Name of a tracker: how often it failed}."""
        for name in names:
            self._try(name, lambda name=name: self._start(name, run))  # type: ignore[misc]

    def _start(self, name: str, run: TrackedRun) -> None:
        self._trackers[name] = TRACKERS[name][0](run)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows scalars, and lists of them one by one as name/0, name/1, ... at a step."""
        flat = scalars(values)
        for name, tracker in self._trackers.items():
            self._try(name, lambda tracker=tracker: tracker.write(step, flat))  # type: ignore[misc]

    def close(self) -> None:
        """Closes all, and says which have failed how often."""
        for name, tracker in self._trackers.items():
            self._try(name, tracker.close)
        for name, count in self.failures.items():
            if count > 1:
                log.warning("the tracker %r failed %d times in all", name, count)

    def _try(self, name: str, action: Callable[[], None]) -> None:
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
    """Makes what trackers are told of a run."""
    return TrackedRun(
        workdir,
        experiment.tracker_project,
        experiment.name or experiment.task,
        to_json(experiment),
        resume_step,
    )
