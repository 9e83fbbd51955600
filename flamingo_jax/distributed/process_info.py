"""Detects the index of this process, the number of processes and the address of process 0."""

import dataclasses
import importlib.util
import os
import pathlib
from typing import Any

import jax

from flamingo_jax.errors import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
DETECTION_SECONDS = 300
LAST_PORT = 65_534
"""The highest port of the coordinator, since the port after it is used as well."""

TASKS = {
    "SLURM_NTASKS": "SLURM_PROCID",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "WORLD_SIZE": "RANK",
}
"""{variable with the number of tasks of a job: variable that every task of the job has}."""
HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
"""Variables with the comma-separated hosts of a TPU slice."""
SLICES = "MEGASCALE_NUM_SLICES"
POD = "JOB_COMPLETION_INDEX"
"""The index of a pod in an indexed Job of Kubernetes, which does not set the number of
pods.
"""
ACCELERATORS = ("accel[0-9]*", "vfio/[0-9]*")
"""Device files of a TPU in /dev."""


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """Identifies this process as process `index` of `count`.

    address: host:port of process 0, where JAX's coordination service listens. The supervisor
      of process 0 listens on the port after it.
    local_devices: ids of the devices of this host that this process uses; None for all.
    """

    index: int
    count: int
    address: str
    local_devices: tuple[int, ...] | None = None

    @property
    def supervisor_address(self) -> tuple[str, int]:
        """Returns (host, port) of the supervisor of process 0."""
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port) + 1


def detect_process(
    address: str | None = None, count: int | None = None, index: int | None = None
) -> ProcessInfo | None:
    """Detects which process of its run this one is.

    The arguments win over the environment variables above, and these over what JAX detects on
    TPU pods, under SLURM and Open MPI. A `count` alone must agree with what JAX detects.

    Returns: None for a run of one process.
    Raises: UserError when only a part is known, when the values contradict each other, or when
      the environment shows several tasks whose indices cannot be found: each of them would
      start a run of its own, all in the same workdir. Pass a `count` of 1 if that is wanted.
    """
    address = address or os.environ.get(ADDRESS)
    count = _number(COUNT) if count is None else count
    index = _number(INDEX) if index is None else index
    if count == 1:
        return None
    # Nothing was given but perhaps a count: ask the cluster.
    if address is None and index is None:
        found = _detect()
        if found is not None and count not in (None, found.count):
            raise UserError(
                f"--processes (or {COUNT}) says {count}, but the cluster has {found.count} "
                "processes: make them equal, or leave the number away"
            )
        if found is not None:
            return None if found.count == 1 else _checked(found)
        if count is None:
            _require_alone()
            return None
    # Otherwise all three values are needed.
    known = {
        f"--coordinator (or {ADDRESS})": address,
        f"--processes (or {COUNT})": count,
        f"--process (or {INDEX})": index,
    }
    if missing := [name for name, value in known.items() if value is None]:
        raise UserError(
            f"of a process's place in the run {' and '.join(missing)} is not known: "
            "give all three, or none where the cluster tells them"
        )
    assert address is not None and count is not None and index is not None
    return _checked(ProcessInfo(index, count, address))


def _checked(process_info: ProcessInfo) -> ProcessInfo:
    index, count = process_info.index, process_info.count
    if count < 1 or not 0 <= index < count:
        raise UserError(
            f"process {index} of {count} does not exist: processes count from 0 to one less"
            " than their number"
        )
    host, _, port = process_info.address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= LAST_PORT:
        raise UserError(
            f"the coordinator's address {process_info.address!r} is not host:port with a port"
            f" from 1 to {LAST_PORT}: the port after it is used as well"
        )
    return process_info


def _require_alone() -> None:
    """Raises a UserError if the environment shows that there are several tasks."""
    environment = os.environ
    told = [f"{name}={environment[name]}" for name in HOSTS if "," in environment.get(name, "")]
    for name, beside in (*TASKS.items(), (SLICES, SLICES)):
        if beside in environment and environment.get(name, "1") != "1":
            told.append(f"{name}={environment[name]}")
    if environment.get(POD, "0") != "0":
        told.append(f"{POD}={environment[POD]}")
    if not told and _detection() is None and _is_tpu_machine():
        told = ["this machine has a TPU, which may be a part of a larger one"]
    if told:
        raise UserError(
            f"there are several tasks ({told[0]}), but jax {jax.__version__} does not find"
            " which of them this is: give each --coordinator, --processes and --process (under"
            " SLURM, start it with srun), or --processes=1 for a run of this process alone"
        )


def _is_tpu_machine() -> bool:
    here = any(path for form in ACCELERATORS for path in pathlib.Path("/dev").glob(form))
    return here and importlib.util.find_spec("libtpu") is not None


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise UserError(
            f"the environment has {name}={text!r}, which is no number: mend or unset it"
        )
    return None if text is None else int(text)


def _detect() -> ProcessInfo | None:
    """Asks JAX, as jax.distributed.initialize does; None if it detects no cluster."""
    detect = _detection()
    if detect is None:
        return None
    try:
        address, count, index, devices = detect(None, None, None, None, None, DETECTION_SECONDS)
    except (TypeError, ValueError):
        # The function is private and may have changed, or a variable is malformed.
        return None
    if address is None or count is None or index is None:
        return None
    host, _, port = address.rpartition(":")
    if port == str(LAST_PORT + 1):
        # JAX derives the port from the SLURM job id, and one job in 4,096 gets the highest
        # one. All tasks of the job come here, so they agree on the port that replaces it.
        address = f"{host}:{LAST_PORT - 1}"
    # JAX reads this variable itself if it is not given any local devices.
    told = "JAX_LOCAL_DEVICE_IDS" in os.environ
    return ProcessInfo(index, count, address, None if devices is None or told else tuple(devices))


def _detection() -> Any:
    """Returns JAX's detection function, which is private; None if it has moved."""
    try:
        from jax._src.clusters import ClusterEnv

        return ClusterEnv.auto_detect_unset_distributed_params
    except (ImportError, AttributeError):
        return None
