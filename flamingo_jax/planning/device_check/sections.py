"""Runs the sections of the device check one after the other, each in a process of its own, so
that one that fails, hangs or fills the memory takes no other with it. Imports no jax: a TPU, and
most of a GPU's memory, belong to one process at a time.
"""

import json
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flamingo_jax.errors import UserError

SUMMARY = "device.json"
"""The file with the results of all sections, written again after each."""
ENDING_SECONDS = 5.0
"""How long before its limit a section should come to its end by itself."""


class Section(NamedTuple):
    """A section of the check.

    share: of the minutes. environment: variables that its process needs from its start.
    """

    name: str
    share: float
    environment: Mapping[str, str] = {}


SECTIONS = (
    Section("attention", 0.10),
    # XLA's compiler and autotuner need memory besides; by default a quarter is left free.
    Section("step", 0.50, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}),
    Section("generation", 0.24, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.85"}),
    # Sums in a fixed order, and no choice of kernels by their time, which may differ at the
    # next start.
    Section("resume", 0.11, {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}),
    Section("images", 0.05, {"JAX_PLATFORMS": "cpu"}),
)
"""In the order in which they run: what is left of a section's time passes on to those after it."""


class CheckFailed(Exception):
    """Signals that a section found something wrong, in one sentence."""


class Results:
    """The results of a section, written to `<folder>/<section>.json` whenever one comes in."""

    def __init__(self, folder: pathlib.Path, section: str):
        self.folder, self._path = folder, folder / f"{section}.json"
        self._values: dict[str, Any] = {}

    def put(self, name: str, value: Any) -> None:
        """Adds a JSON-able result, or replaces it."""
        self._values[name] = value
        write_json(self._path, self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values


class Budget:
    """The time of a section. seconds: how long it may run."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Returns the seconds that are left for work, ending apart."""
        return self._end - time.monotonic() - ENDING_SECONDS


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON atomically, so that a killed process leaves the results before."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def make_folder(folder: pathlib.Path) -> None:
    """Makes the folder of the results. Raises UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={folder} cannot be made: {error}") from error


def run_sections(
    folder: pathlib.Path,
    minutes: float,
    command: Callable[[Section, float], Sequence[str]],
    sections: Sequence[Section] = SECTIONS,
    on_end: Callable[[str, dict[str, Any]], None] = lambda name, found: None,
) -> dict[str, Any]:
    """Runs each section's command for at most its share of the time that is left.

    Args:
      folder: of the results; made if it is missing.
      minutes: for all sections together.
      command: (section, its seconds) -> the command line that runs it.
      on_end: called with each section's name and results.

    Returns: {"sections": {name: results with "status" and "seconds"}, "passed"}, which is also
      in the folder's SUMMARY.

    Raises: UserError where the folder cannot be written.
    """
    make_folder(folder)
    write_json(folder / SUMMARY, {"sections": {}, "passed": False})
    end = time.monotonic() + 60 * minutes
    found: dict[str, Any] = {}
    for place, section in enumerate(sections):
        # The results of an earlier run are not this one's.
        (folder / f"{section.name}.json").unlink(missing_ok=True)
        shares = sum(later.share for later in sections[place:])
        seconds = max((end - time.monotonic()) * section.share / shares, 1.0)
        began = time.monotonic()
        outcome = _run(command(section, seconds), section, folder, seconds)
        outcome["seconds"] = round(time.monotonic() - began, 2)
        found[section.name] = outcome | _results_of(section, folder)
        passed = all(result["status"] == "passed" for result in found.values())
        passed = passed and len(found) == len(sections)
        write_json(folder / SUMMARY, {"sections": found, "passed": passed})
        on_end(section.name, found[section.name])
    return {"sections": found, "passed": passed}


def _results_of(section: Section, folder: pathlib.Path) -> dict[str, Any]:
    path = folder / f"{section.name}.json"
    return {"results": json.loads(path.read_text()) if path.exists() else {}}


def _run(
    command: Sequence[str], section: Section, folder: pathlib.Path, seconds: float
) -> dict[str, Any]:
    """Runs a section's process, ends it at its limit, and tells how it ended."""
    # Unbuffered, so that lines are in the log in their order, and a killed process loses none.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for name, value in section.environment.items():
        # Flags of the user stay, before ours.
        before = environment.get(name, "") if name == "XLA_FLAGS" else ""
        environment[name] = f"{before} {value}".strip()
    log = folder / f"{section.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _kill(process)
            return {
                "status": "timed out",
                "error": f"it had not ended after {seconds:.0f} s; see {log.name}",
            }
        except BaseException:
            _kill(process)
            raise
    if code == 0:
        return {"status": "passed"}
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return {"status": "failed", "error": lines[-1] if lines else f"it ended with code {code}"}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a section's process and its children."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
