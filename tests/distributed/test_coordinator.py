"""What process 0's supervisor decides, by a clock that the test moves."""

from typing import Any

import pytest

from flamingo_jax.distributed.coordinator import (
    CLOCK_SECONDS,
    END,
    SETTLE_SECONDS,
    SLOW_CHECK_SECONDS,
    STAGES,
    Coordinator,
    Timeouts,
)
from flamingo_jax.errors import (
    EXIT_ABSENT,
    EXIT_BAD_INPUT,
    EXIT_HUNG,
    EXIT_LOST,
    EXIT_NOT_FINITE,
    EXIT_PREEMPTED,
    EXIT_SAVE_FAILED,
)

TIMEOUTS = Timeouts(start=100.0, lost=20.0, step=50.0)
FACTS: dict[str, dict[str, Any]] = {
    "config": {"config.seed": 0, "config.optimizer.learning_rate": 1e-3},
    "version": {"jax": "0.10.2"},
    "code": {"a.py": "1"},
    "data": {"d": "x"},
}


def arrived(count: int, present: int | None = None) -> Coordinator:
    coordinator = Coordinator(count, TIMEOUTS, now=0.0)
    for index in range(count if present is None else present):
        coordinator.on_hello(index, count, f"host{index}", 100 + index, 0.0, now=1.0)
        coordinator.on_fingerprint(index, FACTS, now=1.0)
    return coordinator


def said(coordinator: Coordinator, now: float) -> list[Any]:
    return list(coordinator.decide(now))


def running(count: int = 3) -> Coordinator:
    """All have looked at the storage and were told to go, at second 2."""
    coordinator = arrived(count)
    for stage in STAGES:
        assert said(coordinator, 2.0) == [(list(range(count)), {"check_storage": stage})]
        assert not said(coordinator, 2.0) or stage
        for index in range(count):
            coordinator.on_storage_check(index, stage, "", now=2.0)
    ((to, message),) = said(coordinator, 2.0)
    assert to == list(range(count)) and len(message["start"]) == count
    return coordinator


def beat(
    coordinator: Coordinator,
    now: float,
    steps: dict[int, int],
    phase: str = "training",
    **waited: float,
) -> None:
    for index, step in steps.items():
        coordinator.on_heartbeat(index, now, step, phase, waited.get(f"p{index}", 0.0))


def decision(coordinator: Coordinator, now: float) -> tuple[int, str]:
    list(coordinator.decide(now))
    assert coordinator.decision is not None
    return coordinator.decision.code, coordinator.decision.why


def test_who_is_missing_is_said_again_and_again_and_in_the_end() -> None:
    coordinator = arrived(4, present=2)
    for now in (10.0, 20.0):
        ((to, message),) = said(coordinator, now)
        assert (
            to == [0, 1]
            and f"processes 2 and 3 of 4, which did not arrive, for {now:.0f} s" in message["log"]
        )
        beat(coordinator, now, {0: 0, 1: 0}, "starting")
    assert not said(coordinator, 21.0)
    for now in range(21, 101):
        beat(coordinator, float(now), {0: 0, 1: 0}, "starting")
    code, why = decision(coordinator, 101.0)
    assert (
        code == EXIT_ABSENT
        and "processes 2 and 3 of 4" in why
        and "101 s" in why
        and "--start_timeout" in why
    )


@pytest.mark.parametrize(
    ("kind", "key", "value", "words"),
    [
        (
            "config",
            "config.optimizer.learning_rate",
            2e-3,
            "config.optimizer.learning_rate = 0.002, but process 0 (host0, pid 100) has 0.001",
        ),
        ("version", "jax", "0.11.0", "has jax 0.11.0"),
        ("code", "a.py", "2", "has another a.py"),
        ("data", "d", "y", "something else at d"),
    ],
)
def test_what_differs_is_named_with_the_process(
    kind: str, key: str, value: Any, words: str
) -> None:
    coordinator = arrived(3)
    coordinator.on_fingerprint(2, FACTS | {kind: FACTS[kind] | {key: value}}, now=1.0)
    code, why = decision(coordinator, 2.0)
    assert code == EXIT_BAD_INPUT and why.startswith("process 2 (host2, pid 102)") and words in why


def test_a_clock_that_is_off_is_named() -> None:
    coordinator = Coordinator(2, TIMEOUTS, now=0.0)
    coordinator.on_hello(0, 2, "host0", 100, CLOCK_SECONDS / 2, now=1.0)
    assert coordinator.decision is None
    coordinator.on_hello(1, 2, "host1", 101, -3600.0, now=1.0)
    code, why = decision(coordinator, 1.0)
    assert code == EXIT_BAD_INPUT and "process 1 (host1, pid 101) is 3,600 s ahead of" in why


def test_two_with_one_number_and_another_count_are_refused() -> None:
    twice = arrived(2)
    twice.on_hello(1, 2, "host9", 109, 0.0, now=1.0)
    assert "host1" in decision(twice, 1.0)[1] and "host9" in decision(twice, 1.0)[1]
    other = arrived(2, present=1)
    other.on_hello(1, 3, "host1", 101, 0.0, now=1.0)
    assert "one of 3" in decision(other, 1.0)[1]


def test_a_stranger_does_not_end_a_run_that_is_complete() -> None:
    coordinator = running()
    coordinator.on_hello(1, 3, "host9", 109, 0.0, now=3.0)
    assert not said(coordinator, 3.0) and coordinator.decision is None


def test_storage_that_one_cannot_use_is_named() -> None:
    coordinator = arrived(2)
    said(coordinator, 2.0)
    coordinator.on_storage_check(0, STAGES[0], "", now=2.0)
    coordinator.on_storage_check(
        1, STAGES[0], "cannot write to /runs (Read-only file system): ...", now=2.0
    )
    assert decision(coordinator, 2.0) == (
        EXIT_BAD_INPUT,
        "process 1 (host1, pid 101) cannot write to /runs (Read-only file system): ...",
    )


def test_a_broken_connection_and_silence_are_deaths() -> None:
    coordinator = running()
    beat(coordinator, 5.0, {0: 7, 1: 7, 2: 7})
    coordinator.on_disconnect(1, now=6.0)
    assert decision(coordinator, 6.0) == (
        EXIT_LOST,
        "process 1 (host1, pid 101) died at step 7 (training)",
    )
    silent = running()
    for now in range(3, 24):
        beat(silent, float(now), {0: now, 1: now})
    code, why = decision(silent, 23.0)
    assert code == EXIT_LOST and why.startswith(
        "process 2 (host2, pid 102) was not heard of for 21 s"
    )


def test_a_death_is_the_reason_for_errors_that_come_before_word_of_it() -> None:
    coordinator = running()
    coordinator.on_exit(0, 1, "JaxRuntimeError: connection reset", now=10.0)
    assert not said(coordinator, 10.0 + SETTLE_SECONDS / 2)
    coordinator.on_disconnect(1, now=10.5)
    assert decision(coordinator, 10.5)[1].startswith("process 1 (host1, pid 101) died")
    alone = running()
    alone.on_exit(0, 1, "KeyError: 'a'", now=10.0)
    said(alone, 10.0)
    code, why = decision(alone, 10.0 + SETTLE_SECONDS)
    assert (code, why) == (EXIT_LOST, "process 0 (host0, pid 100) stopped: KeyError: 'a'")


def test_of_several_failures_the_killed_one_is_the_reason_and_all_are_told() -> None:
    coordinator = running()
    for index, code, why in (
        (1, -6, "it was ended by SIGABRT"),
        (0, -9, "it was ended by SIGKILL"),
        (2, 1, "JaxRuntimeError"),
    ):
        coordinator.on_exit(index, code, why, now=10.0)
    assert not said(coordinator, 10.0)
    assert said(coordinator, 10.0 + SETTLE_SECONDS) == [
        (
            [0, 1, 2],
            {
                "decision": (
                    EXIT_LOST,
                    "process 0 (host0, pid 100) stopped: it was ended by SIGKILL",
                    0,
                )
            },
        )
    ]


@pytest.mark.parametrize("code", [EXIT_BAD_INPUT, EXIT_NOT_FINITE])
def test_a_users_mistake_ends_all_with_its_code(code: int) -> None:
    coordinator = running()
    coordinator.on_exit(2, code, "the sentence", now=10.0)
    assert decision(coordinator, 10.0) == (code, "process 2 (host2, pid 102) stopped: the sentence")


def test_a_failed_save_keeps_its_code_where_nobody_died() -> None:
    coordinator = running()
    coordinator.on_exit(0, EXIT_SAVE_FAILED, "no space", now=10.0)
    said(coordinator, 10.0)
    assert decision(coordinator, 10.0 + SETTLE_SECONDS)[0] == EXIT_SAVE_FAILED


def test_good_ends_end_nobody_else_unless_the_others_stay() -> None:
    coordinator = running()
    for index in (0, 1, 2):
        coordinator.on_exit(index, EXIT_PREEMPTED, "it was asked to", now=10.0)
        coordinator.on_disconnect(index, now=11.0)
    assert not said(coordinator, 100.0) and coordinator.decision is None
    staying = running()
    staying.on_exit(0, EXIT_PREEMPTED, "it was asked to", now=10.0)
    for now in range(10, 32):
        beat(staying, float(now), {1: now, 2: now})
    code, why = decision(staying, 31.0)
    assert code == EXIT_PREEMPTED and why.startswith(
        "process 0 (host0, pid 100) ended at step 0, and others did not"
    )


def test_those_who_meet_go_on_together() -> None:
    coordinator = running()
    for index in (0, 2):
        coordinator.on_barrier(index, "here", now=5.0)
    assert not said(coordinator, 5.0)
    coordinator.on_barrier(1, "here", now=6.0)
    assert said(coordinator, 6.0) == [([0, 1, 2], {"barrier_passed": "here"})]
    assert not said(coordinator, 7.0)
    for index in (1, 0, 2):
        coordinator.on_barrier(index, "here", now=8.0)
    assert said(coordinator, 8.0) == [([0, 1, 2], {"barrier_passed": "here"})]


def test_who_waits_in_one_place_does_not_answer_for_another() -> None:
    coordinator = running(2)
    coordinator.on_barrier(0, "saving step 2", now=5.0)
    coordinator.on_barrier(1, "the first step", now=5.0)
    assert not said(coordinator, 5.0)
    coordinator.on_barrier(1, "saving step 2", now=6.0)
    assert said(coordinator, 6.0) == [([0, 1], {"barrier_passed": "saving step 2"})]
    coordinator.on_barrier(0, "the first step", now=6.0)
    assert said(coordinator, 6.0) == [([0, 1], {"barrier_passed": "the first step"})]


def all_alive(coordinator: Coordinator, now: float, count: int = 2) -> None:
    """The signs of life of their supervisors."""
    for index in range(count):
        coordinator.on_heartbeat(index, now)


def test_nobody_is_lost_while_one_saves_nor_after_all_met_at_the_end() -> None:
    coordinator = running(2)
    beat(coordinator, 5.0, {0: 4, 1: 4})
    coordinator.on_exit(1, 0, "it was asked to", now=6.0)
    for now in range(6, 600):
        all_alive(coordinator, now)
        coordinator.on_progress(0, "saving step 4", now=now)
        assert not said(coordinator, now) and coordinator.decision is None
    done = running(2)
    for index in (0, 1):
        done.on_barrier(index, END, now=6.0)
    assert said(done, 6.0) == [([0, 1], {"barrier_passed": END})]
    done.on_exit(1, 0, "it was asked to", now=6.0)
    for now in range(6, 600):
        all_alive(done, now)
        assert not said(done, now) and done.decision is None


def test_a_run_that_one_has_left_before_the_end_is_no_finished_one() -> None:
    coordinator = running(2)
    coordinator.on_exit(1, 0, "it was asked to", now=6.0)
    for now in range(6, 28):
        all_alive(coordinator, now)
    code, why = decision(coordinator, 27.0)
    assert code == EXIT_LOST and why.startswith(
        "process 1 (host1, pid 101) ended at step 0, and others did not"
    )


@pytest.mark.parametrize("what", ["saving step 4", "verifying step 4"])
def test_what_gets_on_is_not_hung_and_what_does_not_is_named(what: str) -> None:
    """Others wait for it meanwhile, in a phase of their own that does not change."""
    coordinator = running(2)
    if what.startswith("saving"):
        beat(coordinator, 3.0, {0: 4, 1: 4}, "save")
    coordinator.on_barrier(1, "there", now=3.0)
    for now in range(3, 300):
        all_alive(coordinator, now)
        coordinator.on_progress(0, what, now=now)
        assert not said(coordinator, now) and coordinator.decision is None
    for now in range(300, 352):
        all_alive(coordinator, now)
    code, why = decision(coordinator, 351.0)
    assert (
        code == EXIT_HUNG
        and f"process 0 (host0, pid 100) is at step {4 * what.startswith('saving')} ({what})" in why
    )


def test_one_that_still_reads_before_its_first_step_does_not_hang_who_waits_for_it() -> None:
    coordinator = running(2)
    beat(coordinator, 3.0, {1: 0}, "compile")
    coordinator.on_barrier(1, "the first step", now=3.0)
    for now in range(3, 300):
        all_alive(coordinator, now)
        assert not said(coordinator, now) and coordinator.decision is None


def test_storage_that_does_not_answer_is_named_in_the_end() -> None:
    coordinator = arrived(2)
    said(coordinator, 2.0)
    coordinator.on_storage_check(0, STAGES[0], "", now=2.0)
    for now in range(2, 102):
        all_alive(coordinator, now)
    code, why = decision(coordinator, 101.0)
    assert code == EXIT_ABSENT and "process 1 (host1, pid 101) to look at the storage" in why


def test_a_hung_step_names_the_one_behind() -> None:
    coordinator = running()
    beat(coordinator, 10.0, {0: 5, 1: 4, 2: 5})
    for now in range(10, 61):
        for index in range(3):
            coordinator.on_heartbeat(index, float(now))
    assert coordinator.decision is None
    code, why = decision(coordinator, 61.0)
    assert (
        code == EXIT_HUNG
        and "process 1 (host1, pid 101) is at step 4 (training), others are at step 5" in why
        and "51 s" in why
    )


def test_who_waits_for_data_or_is_late_is_named_once_a_look() -> None:
    coordinator = running()
    for step in range(1, 31):
        now = 2.0 + step
        for index in range(3):
            coordinator.on_heartbeat(
                index, now, step, "training", 0.5 * step if index == 2 else 0.01 * step
            )
    ((to, message),) = said(coordinator, 2.0 + SLOW_CHECK_SECONDS)
    assert to == [0] and message["log"].startswith(
        "process 2 (host2, pid 102) holds the others up: 50% of the time it waits for its data"
    )
    assert not said(coordinator, 2.5 + SLOW_CHECK_SECONDS)

    late = running()
    for step in range(1, 30):
        for index in range(3):
            late.on_heartbeat(
                index, 2.0 + step + (0.4 if index == 1 else 0.0), step, "training", 0.0
            )
    ((_, message),) = said(late, 2.0 + SLOW_CHECK_SECONDS)
    assert message["log"].startswith(
        "process 1 (host1, pid 101) holds the others up: 40% of the time it comes later"
    )
