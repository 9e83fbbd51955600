"""Several real processes of one run on this machine, each with CPU devices of its own, which
speak over gloo.
"""

import json
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from flamingo_jax.checkpointing import manifest
from flamingo_jax.json_lines import read_lines
from tests.processes import one_device

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 300.0
"""The most that a run may take to reach a step, or to end."""
MODULE = ("-m", "launch.train")


class Ended(NamedTuple):
    """What every process left: exit codes, and what it wrote to stderr."""

    codes: list[int]
    logs: list[str]

    def sentences(self) -> list[list[str]]:
        """The errors that each process told its user."""
        return [
            [line for line in log.splitlines() if line.startswith("error: ")] for log in self.logs
        ]


def results(
    commands: Sequence[Sequence[str]], environment: dict[str, str], *, seconds: float
) -> list[Any]:
    """Runs commands side by side to their ends, within so many seconds: the JSON in the last
    line that each prints.
    """
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        ended = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(e for _, e in ended)
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


class RunProcesses:
    """The processes of one start. commands, extra: what each runs and its further flags, where
    they are not the same; logs: where they are written, by default beside the workdir.
    """

    def __init__(
        self,
        count: int,
        config: str,
        workdir: pathlib.Path,
        *overrides: str,
        devices: int = 2,
        commands: Sequence[Sequence[str]] = (),
        extra: Sequence[Sequence[str]] = (),
        logs: pathlib.Path | None = None,
    ):
        environment = one_device() | {
            "XLA_FLAGS": (
                f"--xla_force_host_platform_device_count={devices}"
                " --xla_cpu_collective_call_terminate_timeout_seconds=600"
            )
        }
        port = free_port()
        self.workdir, self._files = workdir, []
        self.processes: list[subprocess.Popen[str]] = []
        for index in range(count):
            log = ((logs or workdir.parent) / f"{workdir.name}.{index}.log").open("w+")
            place = (
                [
                    f"--coordinator=localhost:{port}",
                    f"--processes={count}",
                    f"--process={index}",
                ]
                if count > 1
                else []
            )
            arguments = [
                f"--config={config}",
                f"--workdir={workdir}",
                *place,
                *overrides,
                *(extra[index] if extra else ()),
            ]
            command = [sys.executable, *(commands[index] if commands else MODULE), *arguments]
            self._files.append(log)
            self.processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log, text=True)
            )

    def __enter__(self) -> "RunProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        for process, log in zip(self.processes, self._files, strict=True):
            if process.poll() is None:
                process.kill()
                process.wait()
            log.close()

    def finish(self, seconds: float = SECONDS) -> Ended:
        """Waits for all to end."""
        deadline = time.monotonic() + seconds
        codes = []
        for process in self.processes:
            try:
                codes.append(process.wait(max(deadline - time.monotonic(), 0.1)))
            except subprocess.TimeoutExpired:
                raise AssertionError(
                    f"a process did not end within {seconds:.0f} s:\n"
                    + "\n=====\n".join(self.logs())
                ) from None
        return Ended(codes, self.logs())

    def logs(self) -> list[str]:
        return [pathlib.Path(log.name).read_text() for log in self._files]

    def wait_for(self, step: int) -> None:
        """Until the run has written that step, or ended."""
        deadline = time.monotonic() + SECONDS
        while last_step(self.workdir) < step and all(
            process.poll() is None for process in self.processes
        ):
            assert time.monotonic() < deadline, "\n=====\n".join(self.logs())
            time.sleep(0.01)
        assert all(process.poll() is None for process in self.processes), "\n=====\n".join(
            self.logs()
        )

    def child(self, index: int) -> int:
        """The process that trains, beside its supervisor."""
        pid = self.processes[index].pid
        (child,) = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(child)


def slow_run(
    config: str,
    workdir: pathlib.Path,
    seconds: float,
    patch: pytest.MonkeyPatch,
    *overrides: str,
) -> RunProcesses:
    """Two processes, the first of which takes so long to digest each of its saves, which is
    longer than one may be silent.
    """
    patch.setenv("SECONDS_A_SAVE", str(seconds))
    slow = (str(pathlib.Path(__file__).with_name("slow_save.py")),)
    flags = ("--config.training.save_every=100000", "--lost_after=3", *overrides)
    return RunProcesses(2, config, workdir, *flags, commands=[slow, MODULE])


def run(count: int, config: str, workdir: pathlib.Path, *overrides: str, devices: int = 2) -> Ended:
    """A start that should end well."""
    with RunProcesses(count, config, workdir, *overrides, devices=devices) as started:
        ended = started.finish()
    assert ended.codes == [0] * count, "\n=====\n".join(ended.logs)
    return ended


def last_step(workdir: pathlib.Path) -> int:
    return max((line["step"] for line in read_lines(workdir / "metrics.jsonl")), default=0)


def losses(workdir: pathlib.Path) -> dict[int, float]:
    return {
        line["step"]: line["loss"]
        for line in read_lines(workdir / "metrics.jsonl")
        if "loss" in line
    }


def saved(workdir: pathlib.Path) -> list[int]:
    """Steps with a whole checkpoint, the newest last."""
    paths = workdir.glob(f"checkpoints/*/{manifest.NAME}")
    return sorted(int(path.parent.name) for path in paths if path.parent.name.isdecimal())


def free_port() -> int:
    """One with a free one after it."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("localhost", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("localhost", port + 1))
            except (OSError, OverflowError):
                continue
            return port
