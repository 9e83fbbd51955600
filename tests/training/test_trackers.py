"""Trackers: what they show, that a later start goes on in the same run, that none ends a run."""

import json
import logging
import pathlib
import struct
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.training import trackers
from flamingo_jax.training.trackers import TRACKERS, Trackers, check_trackers, describe_run

RUN = Experiment(name="tiny", tracker_project="tests")


def write(name: str, workdir: pathlib.Path, resume: int, *steps: int) -> Trackers:
    """Shows a loss of 10 * step and two gates at each of the steps."""
    made = Trackers([name], describe_run(RUN, workdir, resume))
    for step in steps:
        made.write(step, {"loss": 10.0 * step, "gates": [0.5, step]})
    made.close()
    return made


def events(file: pathlib.Path) -> Iterator[Event]:
    """Reads TFRecords: length, its checksum, data, its checksum."""
    data = file.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_tensorboard_shows_scalars_and_cuts_back_on_resume(tmp_path: pathlib.Path) -> None:
    write("tensorboard", tmp_path, 0, 1, 2)
    # Files are named by the second in which a start began.
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.rename(tmp_path / "first")
    write("tensorboard", tmp_path, 1, 2)
    files = [tmp_path / "first", *(tmp_path / "tensorboard").iterdir()]
    first, second = (list(events(file)) for file in files)
    assert [(v.tag, e.step, v.simple_value) for e in first for v in e.summary.value] == [
        (tag, step, value)
        for step in (1, 2)
        for tag, value in (("loss", 10.0 * step), ("gates/0", 0.5), ("gates/1", step))
    ]
    (start,) = (event for event in second if event.session_log.status == SessionLog.START)
    assert start.step == 2, "TensorBoard drops what earlier files have from that step on"
    assert not (tmp_path / trackers.ID_FILE).exists()


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Reads LevelDB's log format, behind W&B's own 7 bytes: chunks of checksum, length and type
    (whole, first, middle, last) that cross no border of 32 KiB.
    """
    place, record = 7, b""
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def wandb_history(file: pathlib.Path) -> tuple[list[dict[str, float]], Any]:
    """The metrics of an offline run's file, and its last record of the run itself."""
    from wandb.proto.wandb_internal_pb2 import Record

    lines, run = [], None
    for data in leveldb_records(file.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "run":
            run = record.run
        if record.WhichOneof("record_type") == "history":
            found = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            lines.append({k: v for k, v in found.items() if not k.startswith("_")})
    return lines, run


def test_wandb_goes_on_in_the_same_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", exc_type=ImportError)
    monkeypatch.setenv("WANDB_MODE", "offline")
    told = []
    for place, (resume, *steps) in enumerate([(0, 1, 2), (1, 2, 3)]):
        assert not write("wandb", tmp_path, resume, *steps).failures
        wandb.teardown()  # As when the process ends: its file is whole then.
        (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
        told.append(wandb_history(file))
        # Files are named by the second in which a start began.
        (tmp_path / "wandb").rename(tmp_path / str(place))
    # What a killed run repeats is shown too: a step is a metric like any other.
    assert [[line["step"] for line in lines] for lines, _ in told] == [[1, 2], [2, 3]]
    assert told[1][0][1] == {"step": 3, "loss": 30.0, "gates/0": 0.5, "gates/1": 3}
    assert {run.run_id for _, run in told} == {describe_run(RUN, tmp_path, 0).id}
    assert {(run.project, run.display_name) for _, run in told} == {("tests", "tiny")}


def test_trackio_goes_on_in_the_same_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It reads the variable when it is imported.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "database"))
    pytest.importorskip("trackio", exc_type=ImportError)
    from trackio.sqlite_storage import SQLiteStorage

    starts = [write("trackio", tmp_path, 0, 1, 2), write("trackio", tmp_path, 2, 3)]
    assert [start.failures for start in starts] == [{}, {}]
    name = f"tiny-{describe_run(RUN, tmp_path, 0).id}"
    lines = SQLiteStorage.get_logs("tests", name)
    assert [(line["step"], line["loss"], line["gates/1"]) for line in lines] == [
        (1, 10.0, 1),
        (2, 20.0, 2),
        (3, 30.0, 3),
    ]


class Failing:
    """A tracker that fails at every step but the second, and at its end."""

    shown: typing.ClassVar[list[int]] = []

    def __init__(self, run: trackers.TrackedRun):
        self.shown.clear()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step != 2:
            raise OSError(28, "No space left on device")
        self.shown.append(step)

    def close(self) -> None:
        raise RuntimeError("no network")


def test_a_failing_tracker_is_told_of_once_and_counted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(TRACKERS, "failing", (Failing, "numpy"))
    with caplog.at_level(logging.WARNING):
        made = write("failing", tmp_path, 0, 1, 2, 3)
    assert made.failures == {"failing": 3} and Failing.shown == [2]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "No space left on device): the run goes on" in said[0]
    assert said[1] == "the tracker 'failing' failed 3 times in all"

    def unable(run: trackers.TrackedRun) -> trackers.Tracker:
        raise ConnectionError("no network")

    monkeypatch.setitem(TRACKERS, "failing", (unable, "numpy"))
    assert write("failing", tmp_path, 0, 1).failures == {"failing": 1}


def test_a_tracker_that_is_not_installed_is_told_before_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", (TRACKERS["wandb"][0], "no_such_package"))
    check_trackers(["tensorboard"])
    with pytest.raises(UserError, match=r"pip install 'flamingo_jax\[wandb\]'"):
        check_trackers(["tensorboard", "wandb"])


def test_the_config_knows_all_trackers() -> None:
    (names, _) = typing.get_args(typing.get_type_hints(Experiment)["trackers"])
    assert set(typing.get_args(names)) == set(TRACKERS)
    assert trackers.scalars({"a": 1, "b": [2.0, 3.0], "c": "text"}) == {
        "a": 1,
        "b/0": 2.0,
        "b/1": 3.0,
    }
