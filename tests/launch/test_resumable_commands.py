"""Commands of a run: each once, side by side on cores of their own, and what becomes of the
others when one fails.
"""

import functools
import json
import os
import pathlib

import pytest

from flamingo_jax.errors import EXIT_NOT_LEARNED, UserError
from flamingo_jax.progress import LINE
from launch.resumable_commands import TOTAL_SECONDS, ResumableCommands, ShowLine, halves
from tests.launch import commands

APPEND = "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + ' ')"


def test_a_part_runs_once_and_its_seconds_are_kept(tmp_path: pathlib.Path) -> None:
    for _ in range(2):
        commands = ResumableCommands(tmp_path / "seconds.json")
        commands.run("one", "-c", APPEND, f"{tmp_path}/out", "1")
        commands.run("two", "-c", APPEND, f"{tmp_path}/out", "2")
    assert (tmp_path / "out").read_text() == "1 2 "
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    assert list(seconds) == ["one", TOTAL_SECONDS, "two"]
    assert seconds["one"] + seconds["two"] <= seconds[TOTAL_SECONDS] <= commands.total


def test_a_stage_that_has_not_learned_goes_on_once(tmp_path: pathlib.Path) -> None:
    command = f"{APPEND}; sys.exit({EXIT_NOT_LEARNED} if len(sys.argv) < 4 else 0)"
    ResumableCommands(tmp_path / "seconds.json").run(
        "stage", "-c", command, f"{tmp_path}/out", "1", again=["longer"]
    )
    assert (tmp_path / "out").read_text() == "1 1 "


def test_a_part_that_fails_is_named_and_run_again_by_the_next_start(
    tmp_path: pathlib.Path,
) -> None:
    with pytest.raises(UserError, match=r"stopped in 'bad' \(exit code 7\); start it again"):
        ResumableCommands(tmp_path / "seconds.json").run("bad", "-c", "import sys; sys.exit(7)")
    assert not ResumableCommands(tmp_path / "seconds.json").is_done("bad")


needs_two_cores = pytest.mark.skipif(
    len(halves()) < 2, reason="a process cannot choose between two cores here"
)


@needs_two_cores
def test_lanes_have_cores_of_their_own(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    commands, mine = ResumableCommands(tmp_path / "seconds.json"), os.sched_getaffinity(0)

    def lane(name: str, show: ShowLine) -> None:
        commands.run(
            name,
            "-c",
            f"import os; print('{name}', sorted(os.sched_getaffinity(0)))",
            show=show,
        )

    commands.side_by_side([functools.partial(lane, name) for name in ("a", "b")], halves())
    said = capfd.readouterr().err
    for name, cores in zip(("a", "b"), halves(), strict=True):
        assert f"{name} {sorted(cores)}" in said
    assert os.sched_getaffinity(0) == mine and set.union(*halves()) == mine


@needs_two_cores
def test_when_a_lane_fails_the_other_is_asked_to_end(tmp_path: pathlib.Path) -> None:
    commands = ResumableCommands(tmp_path / "seconds.json")
    waits = f"import pathlib, time; pathlib.Path('{tmp_path}/on').touch(); time.sleep(600)"
    fails = (
        f"import pathlib, sys, time\nwhile not pathlib.Path('{tmp_path}/on').exists():"
        " time.sleep(0.01)\nsys.exit(7)"
    )
    with pytest.raises(UserError, match="'fails'"):
        commands.side_by_side(
            [
                lambda show: commands.run("waits", "-c", waits, show=show),
                lambda show: commands.run("fails", "-c", fails, show=show),
            ],
            halves(),
        )
    assert not commands.is_done("waits")


def test_nothing_starts_once_the_run_was_stopped(tmp_path: pathlib.Path) -> None:
    commands = ResumableCommands(tmp_path / "seconds.json")
    commands.stop()
    with pytest.raises(UserError, match="was stopped; start it again"):
        commands.run("late", "-c", APPEND, f"{tmp_path}/out", "1")
    assert not (tmp_path / "out").exists()


def test_another_seed_in_the_same_folder_is_refused(tmp_path: pathlib.Path) -> None:
    quickstart = commands.load("quickstart")
    (tmp_path / "flamingo").mkdir()
    (tmp_path / "flamingo" / "config.json").write_text('{"seed": 1}')
    quickstart._require_seed(tmp_path, 1)
    with pytest.raises(
        UserError, match=r"flamingo was trained with --seed=1, not 0: name another --workdir"
    ):
        quickstart._require_seed(tmp_path, 0)


def test_a_relay_knows_the_lines_of_a_bar() -> None:
    for line, found in (
        (
            "language model 130/3000 loss 1.2865  9,642 tokens/s 447 s left",
            ("language model", "130", "3000", "loss 1.2865  9,642 tokens/s"),
        ),
        (
            "features of m3w 3/24 128 images nan s left",
            ("features of m3w", "3", "24", "128 images"),
        ),
        ("vqa, seen 300/300  in 4 s", ("vqa, seen", "300", "300", "")),
    ):
        match = LINE.fullmatch(line)
        assert match is not None and match.groups() == found
    assert LINE.fullmatch("12:00:01 I compiled the update in 6 s, 99 MiB a device") is None
