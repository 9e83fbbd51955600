"""Hosts and storage that fail: one sentence, an exit code of its own, no hang, and the last
good checkpoint whole.
"""

import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from flamingo_jax.errors import EXIT_BAD_INPUT, EXIT_HUNG, EXIT_LOST, EXIT_SAVE_FAILED
from tests.multi_process.run_processes import MODULE, RunProcesses, last_step, run, saved
from tests.multi_process.test_faults import require_whole

pytestmark = pytest.mark.scale
ENDLESS = ("--config.training.steps=100000", "--config.training.save_every=5")


@pytest.fixture(scope="module")
def config(data: pathlib.Path) -> str:
    return f"tests/end_to_end/small.py:language_model,{data}"


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of its own, 64 MiB large."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder], capture_output=True
    ).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def require_told(sentences: list[list[str]], word: str) -> None:
    for told in sentences:
        assert len(told) == 1 and word in told[0], sentences


def test_a_full_disk(config: str, disk: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with RunProcesses(2, config, disk / "run", *ENDLESS) as started:
        started.wait_for(12)
        filler = (disk / "filler").open("wb")
        with pytest.raises(OSError, match="space"):
            while True:
                os.write(filler.fileno(), bytes(4096))
        ended = started.finish(seconds=90)
    assert ended.codes == [EXIT_SAVE_FAILED] * 2, ended.logs
    require_told(ended.sentences(), "No space left on device")
    assert not any("Traceback" in log for log in ended.logs), ended.logs
    require_whole(disk / "run")
    before = saved(disk / "run")[-1]
    filler.close()
    (disk / "filler").unlink()
    run(2, config, disk / "run", f"--config.training.steps={before + 6}", ENDLESS[1])
    assert saved(disk / "run")[-1] == before + 6


def test_a_checkpoint_folder_gone_read_only(config: str, disk: pathlib.Path) -> None:
    checkpoints = disk / "run" / "checkpoints"
    with RunProcesses(2, config, disk / "run", *ENDLESS) as started:
        started.wait_for(7)
        subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", checkpoints], check=True)
        ended = started.finish(seconds=90)
    subprocess.run(["umount", "-l", checkpoints], check=True)
    assert ended.codes == [EXIT_SAVE_FAILED] * 2, ended.logs
    require_told(ended.sentences(), "Read-only file system")
    require_whole(disk / "run")
    run(
        2,
        config,
        disk / "run",
        f"--config.training.steps={saved(disk / 'run')[-1] + 2}",
        ENDLESS[1],
    )


def test_a_folder_that_is_read_only_from_the_start(
    config: str, disk: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with RunProcesses(2, config, disk / "run", logs=tmp_path) as started:
        ended = started.finish(seconds=90)
    assert ended.codes == [EXIT_BAD_INPUT] * 2, ended.logs
    require_told(ended.sentences(), "Read-only file system")


def test_a_clock_that_is_an_hour_ahead(config: str, tmp_path: pathlib.Path) -> None:
    late = (str(pathlib.Path(__file__).with_name("late_clock.py")),)
    with RunProcesses(2, config, tmp_path / "run", commands=[MODULE, late]) as started:
        ended = started.finish(seconds=90)
    assert ended.codes == [EXIT_BAD_INPUT] * 2, ended.logs
    require_told(ended.sentences(), "the clock of process 1")
    assert "3,6" in ended.sentences()[0][0] and not (tmp_path / "run").exists()


def test_a_machine_that_stands_still(config: str, tmp_path: pathlib.Path) -> None:
    """SIGSTOP to a training process: its supervisor lives, and no step ends; to both: nothing
    is heard of them.
    """
    with RunProcesses(2, config, tmp_path / "run", *ENDLESS, "--step_timeout=30") as started:
        started.wait_for(3)
        child = started.child(1)
        os.kill(child, signal.SIGSTOP)
        ended = started.finish(seconds=120)
    assert ended.codes == [EXIT_HUNG] * 2, ended.logs
    require_told(ended.sentences(), "no step ended for")
    with RunProcesses(2, config, tmp_path / "silent", *ENDLESS, "--lost_after=8") as started:
        started.wait_for(3)
        child = started.child(1)
        os.kill(child, signal.SIGSTOP)
        os.kill(started.processes[1].pid, signal.SIGSTOP)
        code = started.processes[0].wait(60)
        os.kill(child, signal.SIGKILL)
        os.kill(started.processes[1].pid, signal.SIGKILL)
        ended = started.finish()
    assert code == EXIT_LOST
    require_told(ended.sentences()[:1], "process 1")


def test_a_host_that_reads_slowly_is_named(config: str, tmp_path: pathlib.Path) -> None:
    slow = (str(pathlib.Path(__file__).with_name("slow_reader.py")),)
    with RunProcesses(2, config, tmp_path / "run", *ENDLESS, commands=[MODULE, slow]) as started:
        deadline = time.monotonic() + 240
        while "process 1" not in "".join(
            line for line in started.logs()[0].splitlines() if "waits for its data" in line
        ):
            assert time.monotonic() < deadline, started.logs()
            time.sleep(0.5)
        assert not any(
            "process 0" in line
            for line in started.logs()[0].splitlines()
            if "waits for its data" in line
        )


def test_two_hundred_saves_leave_memory_flat(config: str, tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "run"
    with RunProcesses(
        2,
        config,
        workdir,
        "--config.training.steps=400",
        "--config.training.save_every=2",
        "--config.training.log_every=10",
    ) as started:
        held: dict[int, list[int]] = {}
        started.wait_for(20)
        children = [started.child(index) for index in range(2)]
        while all(process.poll() is None for process in started.processes):
            try:
                held[last_step(workdir)] = [_resident(child) for child in children]
            except (FileNotFoundError, IndexError):
                break
            time.sleep(0.5)
        assert started.finish().codes == [0, 0]
    early, late = (
        [sizes for step, sizes in held.items() if first <= step <= last]
        for first, last in ((100, 200), (300, 400))
    )
    before, after = (
        [sum(sizes[index] for sizes in part) / len(part) / 2**20 for index in range(2)]
        for part in (early, late)
    )
    print(
        f"\n200 saves: {before[0]:.0f} and {before[1]:.0f} MiB after 50 to 100, {after[0]:.0f}"
        f" and {after[1]:.0f} after 150 to 200"
    )
    assert all(b - a < 16 for a, b in zip(before, after, strict=True))


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )
