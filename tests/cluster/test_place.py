"""Where a process stands in its run."""

import re

import pytest

from flamingo_jax.cluster import place
from flamingo_jax.cluster.place import Place, find_place
from flamingo_jax.errors import UserError


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (place.ADDRESS, place.COUNT, place.INDEX):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(place, "_detect", lambda: (None, None, None, None))


def test_a_run_of_one_process_has_no_place() -> None:
    assert find_place() is None
    assert find_place(count=1) is None


def test_flags_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ((place.ADDRESS, "a:1234"), (place.COUNT, "4"), (place.INDEX, "3")):
        monkeypatch.setenv(name, value)
    assert find_place() == Place(3, 4, "a:1234")
    assert find_place("b:99", index=0) == Place(0, 4, "b:99")
    assert Place(0, 4, "[::1]:99").meeting == ("::1", 100)


def test_what_slurm_tells_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    found = find_place()
    assert found is not None and (found.index, found.count, found.local_devices) == (1, 2, (0,)) and found.address.startswith("node3:")
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0,1")
    found = find_place()
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
        find_place(*given)


def test_an_environment_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(place.COUNT, "four")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES='four'"):
        find_place()
