"""Which process of a run this is, and where the others meet."""

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
"""The highest that the coordinator may have: the one after it is used as well."""

TASKS = {
    "SLURM_NTASKS": "SLURM_PROCID",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "WORLD_SIZE": "RANK",
}
"""Variables that hold the number of a job's tasks, and what stands beside each in every task.
"""
HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
"""Variables that list the hosts of a TPU slice, with commas between them."""
SLICES = "MEGASCALE_NUM_SLICES"
POD = "JOB_COMPLETION_INDEX"
"""Of a pod of an indexed Job in Kubernetes, which does not say how many there are."""
ACCELERATORS = ("accel[0-9]*", "vfio/[0-9]*")
"""A TPU's device files in /dev."""


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """Tells that this is process `index` of `count`.

    address: host:port of process 0, where JAX's own service listens; this run's supervisors
      meet at the port after it.
    local_devices: the devices of this host that are this process's; None for all of them.
    """

    index: int
    count: int
    address: str
    local_devices: tuple[int, ...] | None = None

    @property
    def supervisor_address(self) -> tuple[str, int]:
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port) + 1


def detect_process(
    address: str | None = None, count: int | None = None, index: int | None = None
) -> ProcessInfo | None:
    """Detects which process of its run this one is.

    It is what is given, else the environment variables above, else what JAX finds on TPU pods,
    SLURM and Open MPI. A number of processes alone is one that the latter must agree with.

    Returns: None for a run of one process.
    Raises: UserError where only a part is known, it does not fit together, or the environment
      tells
      of several tasks whose places cannot be found: each would be a run of its own, all of them
      in one workdir. A `count` of 1 says that it shall be.
    """
    address = address or os.environ.get(ADDRESS)
    count = _number(COUNT) if count is None else count
    index = _number(INDEX) if index is None else index
    if count == 1:
        return None
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
    """Raises a UserError where the environment tells of further tasks than this one."""
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
    """Finds what JAX itself would; None where it knows of no cluster."""
    detect = _detection()
    if detect is None:
        return None
    try:
        address, count, index, devices = detect(None, None, None, None, None, DETECTION_SECONDS)
    except (TypeError, ValueError):
        # It takes or gives something else by now, or reads a variable that is not as it should
        # be.
        return None
    if address is None or count is None or index is None:
        return None
    host, _, port = address.rpartition(":")
    if port == str(LAST_PORT + 1):
        # One SLURM job in 4,096 gets it. All of its tasks come here.
        address = f"{host}:{LAST_PORT - 1}"
    # JAX reads these itself where it is not given any.
    told = "JAX_LOCAL_DEVICE_IDS" in os.environ
    return ProcessInfo(index, count, address, None if devices is None or told else tuple(devices))


def _detection() -> Any:
    """Returns JAX's function for it, which has no public name; None where it has moved."""
    try:
        from jax._src.clusters import ClusterEnv

        return ClusterEnv.auto_detect_unset_distributed_params
    except (ImportError, AttributeError):
        return None
