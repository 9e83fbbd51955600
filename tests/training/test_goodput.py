"""Where the time of a run went, against sums made by hand."""

import json
import pathlib

import pytest

from flamingo_jax.checkpointing import manifest
from flamingo_jax.errors import UserError
from flamingo_jax.json_lines import read_lines
from flamingo_jax.training import goodput
from flamingo_jax.training.goodput import FILE_NAME, KINDS, Goodput, read_goodput
from flamingo_jax.training.metric_writer import MetricWriter
from tests.launch import commands


class Clock:
    """Stands in for the module `time`: `pass_` lets seconds go by, `set_back` moves the wall
    clock alone.
    """

    def __init__(self) -> None:
        self._seconds, self._offset = 1000.0, 1.7e9

    def monotonic(self) -> float:
        return self._seconds

    def time(self) -> float:
        return self._seconds + self._offset

    def pass_(self, seconds: float) -> None:
        self._seconds += seconds

    def set_back(self, seconds: float) -> None:
        self._offset -= seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(goodput, "time", made)
    return made


def begin(clock: Clock, workdir: pathlib.Path, resume_step: int, seconds: float) -> Goodput:
    """A start whose way to the loop takes these seconds."""
    began = clock.monotonic()
    clock.pass_(seconds)
    return Goodput(workdir, resume_step, began=began)


def spend(clock: Clock, run: Goodput, kind: str, seconds: float) -> None:
    with run.timed(kind):
        clock.pass_(seconds)


def three_starts(clock: Clock, workdir: pathlib.Path) -> None:
    """Killed after a mark at step 30 with 20 saved; preempted and saved at 40; ended at 60."""
    first = begin(clock, workdir, 0, 20)
    clock.pass_(1)
    spend(clock, first, "compile", 30)
    clock.pass_(9)
    first.record(10, waited=1)
    clock.pass_(10)
    first.record(20, waited=3)
    spend(clock, first, "save", 2)
    clock.pass_(12)
    first.record(30, waited=3)
    clock.pass_(7)

    clock.pass_(100)
    second = begin(clock, workdir, 20, 25)
    clock.pass_(21)
    second.record(40, waited=1)
    spend(clock, second, "save", 4)
    second.close()

    clock.pass_(50)
    third = begin(clock, workdir, 40, 15)
    clock.pass_(20)
    third.record(60)
    spend(clock, third, "save", 3)
    spend(clock, third, "evaluate", 6)
    third.close()


def seconds(**kinds: float) -> dict[str, float]:
    return pytest.approx(dict.fromkeys(KINDS, 0.0) | kinds, abs=1e-3)


def test_three_starts_with_a_kill(clock: Clock, tmp_path: pathlib.Path) -> None:
    three_starts(clock, tmp_path)
    made = read_goodput(tmp_path)
    first, second, third = made.starts
    # Steps 1 to 20 took 10 - 1 and 10 - 2 seconds besides waiting; the 12 of steps 21 to 30 are
    # lost.
    assert first.seconds == seconds(start=20, compile=30, data=3, save=2, steps=17, lost=12)
    # The killed start's last 7 seconds are in no line.
    assert second.seconds == seconds(down=107, start=25, data=1, steps=20, save=4)
    assert third.seconds == seconds(down=50, start=15, steps=20, save=3, evaluate=6)
    assert [(start.resume, start.step) for start in made.starts] == [
        (0, 30),
        (20, 40),
        (40, 60),
    ]
    assert made.seconds == seconds(
        steps=57, start=60, compile=30, data=4, save=9, evaluate=6, lost=12, down=157
    )
    # No second of the chain is left out or counted twice.
    assert sum(made.seconds.values()) == pytest.approx(clock.monotonic() - 1000)
    assert made.share == pytest.approx(57 / 335, abs=1e-4)
    assert (
        made.sentence()
        == "goodput 17.0 %: down 46.9, start 17.9, compile 9.0, lost 3.6, save 2.7, evaluate"
        " 1.8, data 1.2"
    )


def test_a_start_that_goes_back_over_several(clock: Clock, tmp_path: pathlib.Path) -> None:
    three_starts(clock, tmp_path)
    begin(clock, tmp_path, 15, 5)
    made = read_goodput(tmp_path)
    # Half of the 8 seconds of steps 11 to 20 is before step 15, and nothing of the later
    # starts.
    assert [start.seconds["steps"] for start in made.starts] == pytest.approx([9 + 4, 0, 0, 0])
    assert [start.seconds["lost"] for start in made.starts] == pytest.approx([4 + 12, 20, 20, 0])


def test_a_line_that_a_kill_cut_short(clock: Clock, tmp_path: pathlib.Path) -> None:
    run = begin(clock, tmp_path, 0, 2)
    clock.pass_(5)
    run.record(10)
    whole = (tmp_path / FILE_NAME).read_text()
    (tmp_path / FILE_NAME).write_text(whole + '{"step": 20, "seconds": {"st')
    assert read_goodput(tmp_path).seconds == seconds(start=2, steps=5)
    clock.pass_(3)
    again = begin(clock, tmp_path, 10, 4)
    clock.pass_(6)
    again.record(20)
    assert (tmp_path / FILE_NAME).read_text().startswith(whole)
    assert read_goodput(tmp_path).seconds == seconds(start=6, steps=11, down=3)


def test_a_clock_that_is_set_back(clock: Clock, tmp_path: pathlib.Path) -> None:
    run = begin(clock, tmp_path, 0, 2)
    clock.set_back(3600)
    clock.pass_(5)
    run.record(10)
    clock.pass_(60)
    clock.set_back(3600)
    begin(clock, tmp_path, 10, 4).close()
    assert read_goodput(tmp_path).seconds == seconds(start=6, steps=5)


def test_inner_phases_and_more_waiting_than_steps(clock: Clock, tmp_path: pathlib.Path) -> None:
    run = begin(clock, tmp_path, 0, 0)
    with pytest.raises(KeyError), run.timed("evaluate"):
        clock.pass_(1)
        spend(clock, run, "compile", 2)
        clock.pass_(4)
        raise KeyError
    clock.pass_(8)
    run.record(1, waited=9)
    # Waiting that was told once is not told again, and a smaller sum takes nothing back.
    clock.pass_(16)
    run.record(2, waited=9)
    run.record(3, waited=0)
    clock.pass_(32)
    run.close()
    assert read_goodput(tmp_path).seconds == seconds(
        evaluate=5, compile=2, data=8, steps=16, lost=32
    )
    with pytest.raises(ValueError, match="'saving' is no kind of time"), run.timed("saving"):
        pass


def test_other_processes_write_nothing(tmp_path: pathlib.Path) -> None:
    run = Goodput(tmp_path, 0, enabled=False)
    with run.timed("compile"):
        run.record(1)
    run.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=FILE_NAME):
        read_goodput(tmp_path)


def test_the_command(
    clock: Clock,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    three_starts(clock, tmp_path)
    command = commands.load("goodput")
    monkeypatch.setattr(command, "WORKDIR", commands.flag(str(tmp_path)))
    monkeypatch.setattr(command, "JSON", commands.flag(True))
    assert command.main() == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        told["goodput"] == pytest.approx(57 / 335)
        and told["seconds"]["lost"] == 12
        and told["starts"][1]["seconds"]["down"] == 107
    )
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(command, "JSON", commands.flag(False))
    assert command.main() == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [
        "2",
        "20",
        "40",
        "20.0",
        "25.0",
        "0.0",
        "1.0",
        "4.0",
        "0.0",
        "0.0",
        "107.0",
        "12.7%",
    ] in rows
    assert [
        "all",
        "57.0",
        "60.0",
        "30.0",
        "4.0",
        "9.0",
        "6.0",
        "12.0",
        "157.0",
        "17.0%",
    ] in rows
    monkeypatch.setattr(command, "WORKDIR", commands.flag(""))
    with pytest.raises(UserError, match="--workdir is not set"):
        command.main()


def test_a_file_that_cannot_be_read_just_now_is_not_taken_for_none(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run has measured is cut back to its checkpoint at every start: nothing read would
    leave nothing."""
    monkeypatch.setattr(manifest, "READ_AGAIN_AFTER", (0.0,))
    assert read_lines(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "metrics.jsonl")
    for read in (read_lines, lambda path: MetricWriter(path.parent, resume_step=1)):
        with pytest.raises(OSError, match="Too many levels"):
            read(tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").is_symlink()
