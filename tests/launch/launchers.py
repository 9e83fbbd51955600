"""Executables that stand in for srun, scontrol, gcloud, git and Python beside the cluster
launchers' scripts, and the JobSets.
"""

import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import yaml

from flamingo_jax import errors

ROOT = pathlib.Path(__file__).parents[2]
SLURM, AGAIN, TPU = (
    ROOT / "launch" / name for name in ("slurm/train.sbatch", "tpu_vm/again.sh", "tpu_vm/tpu.sh")
)
FINAL = [errors.EXIT_BAD_INPUT, errors.EXIT_NOT_FINITE, errors.EXIT_NOT_LEARNED]
PREEMPTED = errors.EXIT_PREEMPTED
RESTARTED = [1, 69, 74, PREEMPTED, 76, 77, 134, 137, 139]
"""What is mended by a start: 1 is a traceback, those above 128 are signals."""

PYTHON = """#!/bin/bash
# Ends with the next code of the file `codes`; one above 128 by that signal; `saves` waits for SIGTERM (once `waiting` is there), takes a while, ends with 75.
echo "$JAX_LOCAL_DEVICE_IDS $(printf '%q ' "$@")" >> started
read -r code < codes
sed -i 1d codes
if [ "$code" = saves ]; then
    trap 'sleep 0.3; exit 75' TERM
    touch waiting
    for ((i = 0; i < 100; i++)); do sleep 0.1; done
    exit 99
fi
if [ "${code:-0}" -gt 128 ]; then kill -$((code - 128)) $$; fi
exit "${code:-0}"
"""  # noqa: E501
SRUN = """#!/bin/bash
# Runs its tasks one after the other and ends with the highest of their codes, as srun does.
trap : TERM
while [[ $1 == --* ]]; do echo "$1" >> srun; shift; done
highest=0
for ((i = 0; i < ${TASKS:-1}; i++)); do
    "$@"
    code=$?
    if [ $code -gt $highest ]; then highest=$code; fi
done
exit $highest
"""
SCONTROL = """#!/bin/bash
echo "$@" >> scontrol
"""
GCLOUD = """#!/bin/bash
# Writes down what it was asked. The commands of ssh run in the folder of their node; states of a queued resource come from the file `states`.
cd "$STUBS"
(flock 8; printf '%s\\x1f' "$@" END >> gcloud) 8> gcloud.lock
case "$*" in
    *" describe "*) read -r state < states; sed -i 1d states; echo "$state" ;;
    *" scp "*) cp "$5" "${6%%:*}/${6#*:}" ;;
    *" ssh "*) for word in "$@"; do case $word in --command=*) cd "$5" && HOME=$PWD bash -c "${word#--command=}" || exit ;; esac; done ;;
esac
"""  # noqa: E501


GIT = """#!/bin/bash
# `git archive --output=FILE HEAD`: the commit is what lies in the folder `commit`.
for word in "$@"; do case $word in --output=*) file=${word#--output=} ;; esac; done
cd "$STUBS/commit" && tar -czf "$file" *
"""


def executable(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def lines(path: pathlib.Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def until(condition: Callable[[], object]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited for 60 s")


def codes(folder: pathlib.Path, *values: object) -> None:
    (folder / "codes").write_text("".join(f"{value}\n" for value in values))


def tpu(
    folder: pathlib.Path, *arguments: str, expect: int = 0, **environment: str
) -> list[list[str]]:
    """The calls of gcloud that a command makes, without "compute tpus" in front and the zone
    behind.
    """
    (folder / "gcloud").unlink(missing_ok=True)
    environment = {"ZONE": "z", "NAME": "n", "TYPE": "v4-32", "POLL_SECONDS": "0"} | environment
    done = subprocess.run(
        [TPU, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == expect, done.stderr
    written = (folder / "gcloud").read_text() if (folder / "gcloud").exists() else ""
    calls = [call.split("\x1f")[:-1] for call in written.split("END\x1f")[:-1]]
    assert all(call[:2] == ["compute", "tpus"] and call[-1] == "--zone=z" for call in calls)
    return [call[2:-1] for call in calls]


def commit(stubs: pathlib.Path, *files: str) -> None:
    """Makes these the commit that setup brings, each with its name in it."""
    executable(stubs / "bin" / "git", GIT)
    shutil.rmtree(stubs / "commit", ignore_errors=True)
    for name in files:
        executable(stubs / "commit" / name, name)


def jobset(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The JobSet's spec, its one replicated job, and the container of its pods."""
    made = yaml.safe_load((ROOT / "launch/gke" / f"{name}.yaml").read_text())
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = made["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return made, job, container
