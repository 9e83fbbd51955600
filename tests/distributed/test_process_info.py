"""Where a process stands in its run."""

import re

import pytest

from flamingo_jax.distributed import process_info
from flamingo_jax.distributed.process_info import ProcessInfo, detect_process
from flamingo_jax.errors import UserError


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    known = (
        process_info.ADDRESS,
        process_info.COUNT,
        process_info.INDEX,
        *process_info.TASKS,
        *process_info.HOSTS,
        process_info.SLICES,
    )
    for name in (*known, process_info.POD):
        monkeypatch.delenv(name, raising=False)


def test_a_run_of_one_process_has_no_place() -> None:
    assert detect_process() is None
    assert detect_process(count=1) is None


def test_flags_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        (process_info.ADDRESS, "a:1234"),
        (process_info.COUNT, "4"),
        (process_info.INDEX, "3"),
    ):
        monkeypatch.setenv(name, value)
    assert detect_process() == ProcessInfo(3, 4, "a:1234")
    assert detect_process("b:99", index=0) == ProcessInfo(0, 4, "b:99")
    assert ProcessInfo(0, 4, "[::1]:99").supervisor_address == ("::1", 100)


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
SEVERAL = [
    SLURM,
    OPEN_MPI,
    # What Open MPI 5 no longer sets, or a job step that srun did not start.
    {name: value for name, value in OPEN_MPI.items() if "orte" not in name},
    {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
    {"PMI_SIZE": "2", "PMI_RANK": "0"},
    {"WORLD_SIZE": "16", "RANK": "3"},
    {"TPU_WORKER_HOSTNAMES": "host-0,host-1", "TPU_WORKER_ID": "0"},
    {"TPU_PROCESS_ADDRESSES": "host-0:8471,host-1:8471"},
    {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "0"},
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"},
]


def set_all(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_what_slurm_tells_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SLURM)
    found = detect_process()
    assert (
        found is not None
        and (found.index, found.count, found.local_devices) == (1, 2, (0,))
        and found.address.startswith("node3:")
    )
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0,1")
    found = detect_process()
    assert found is not None and found.local_devices is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("a:1", 4, None), "--process (or JAX_PROCESS_ID) is not known"),
        (("a:1", 4, 4), "process 4 of 4 does not exist"),
        (("a", 4, 0), "'a' is not host:port"),
        (("a:65535", 4, 0), "is not host:port"),
    ],
)
def test_what_does_not_fit_is_refused(given: tuple[str, int, int | None], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        detect_process(*given)


def test_an_environment_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(process_info.COUNT, "four")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES='four'"):
        detect_process()


@pytest.mark.parametrize("told", SEVERAL, ids=lambda told: next(iter(told)))
def test_several_tasks_whose_places_are_unknown_are_refused(
    told: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jax's detection has moved, or finds nothing: each task would train alone in one workdir."""
    set_all(monkeypatch, told)
    for detection in (lambda: None, lambda: lambda *_: (None, None, None, None)):
        monkeypatch.setattr(process_info, "_detection", detection)
        with pytest.raises(UserError, match="there are several tasks") as caught:
            detect_process()
        assert any(f"{name}={value}" in str(caught.value) for name, value in told.items())
        assert detect_process(count=1) is None


def test_a_detection_of_another_form_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_info, "_detection", lambda: lambda address, count: (address, count))
    assert detect_process() is None
    set_all(monkeypatch, OPEN_MPI)
    with pytest.raises(UserError, match="OMPI_COMM_WORLD_SIZE=4"):
        detect_process()


def test_a_tpu_machine_that_jax_does_not_ask_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_info, "_is_tpu_machine", lambda: True)
    assert detect_process() is None
    monkeypatch.setattr(process_info, "_detection", lambda: None)
    with pytest.raises(UserError, match="this machine has a TPU"):
        detect_process()


@pytest.mark.parametrize(
    "told",
    [
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        # The shell of an allocation, which is no task.
        {"SLURM_NTASKS": "8"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
    ],
)
def test_one_task_is_alone(told: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, told)
    monkeypatch.setattr(process_info, "_detection", lambda: None)
    assert detect_process() is None


def test_a_number_alone_is_what_the_cluster_must_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(process_info.COUNT, "2")
    with pytest.raises(UserError, match="--coordinator .* and --process .* is not known"):
        detect_process()
    set_all(monkeypatch, SLURM)
    found = detect_process()
    assert found is not None and (found.index, found.count) == (1, 2)
    with pytest.raises(UserError, match="says 4, but the cluster has 2"):
        detect_process(count=4)


def test_every_slurm_job_has_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jax takes the last 4,096 in turn, and the one after it must be there."""
    set_all(monkeypatch, SLURM)
    for job in (4094, 4095, 4096):
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        found = detect_process()
        assert found is not None and found.supervisor_address[1] <= 65_535
