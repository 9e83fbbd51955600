"""Which process of a run this is, and where the others meet."""

import dataclasses
import os

from flamingo_jax.errors import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
DETECTION_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Place:
    """Process `index` of `count`.

    address: host:port of process 0, where JAX's own service listens; this run's supervisors meet at the port after it. local_devices: the devices of
    this host that are this process's; None for all of them.
    """

    index: int
    count: int
    address: str
    local_devices: tuple[int, ...] | None = None

    @property
    def meeting(self) -> tuple[str, int]:
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port) + 1


def find_place(address: str | None = None, count: int | None = None, index: int | None = None) -> Place | None:
    """This process's place: what is given, else the environment variables above, else what JAX finds on TPU pods, SLURM and Open MPI.

    Returns: None for a run of one process.
    Raises: UserError where only a part is known, or it does not fit together.
    """
    address = address or os.environ.get(ADDRESS)
    count = _number(COUNT) if count is None else count
    index = _number(INDEX) if index is None else index
    known = {f"--coordinator (or {ADDRESS})": address, f"--processes (or {COUNT})": count, f"--process (or {INDEX})": index}
    local_devices = None
    if not any(value is not None for value in known.values()):
        address, count, index, local_devices = _detect()
        if address is None or count is None or index is None:
            return None
    elif count != 1 and (missing := [name for name, value in known.items() if value is None]):
        raise UserError(f"of a process's place in the run {' and '.join(missing)} is not known: give all three, or none where the cluster tells them")
    if count == 1:
        return None
    assert address is not None and count is not None and index is not None
    if count < 1 or not 0 <= index < count:
        raise UserError(f"process {index} of {count} does not exist: processes count from 0 to one less than their number")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_535:
        raise UserError(f"the coordinator's address {address!r} is not host:port with a port from 1 to 65534: the port after it is used as well")
    return Place(index, count, address, local_devices)


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise UserError(f"the environment has {name}={text!r}, which is no number: mend or unset it")
    return None if text is None else int(text)


def _detect() -> tuple[str | None, int | None, int | None, tuple[int, ...] | None]:
    """What JAX itself would find out: it has no public name for it."""
    try:
        from jax._src.clusters import ClusterEnv

        detect = ClusterEnv.auto_detect_unset_distributed_params
    except (ImportError, AttributeError):
        return None, None, None, None
    address, count, index, devices = detect(None, None, None, None, None, DETECTION_SECONDS)
    # JAX reads these itself where it is not given any.
    told = "JAX_LOCAL_DEVICE_IDS" in os.environ
    return address, count, index, None if devices is None or told else tuple(devices)
