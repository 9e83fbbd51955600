"""What process 0's supervisor decides, by a clock that the test moves."""

from typing import Any

import pytest

from flamingo_jax.cluster.register import (
    CLOCK_SECONDS,
    END,
    LOOK_EVERY,
    SETTLE_SECONDS,
    STAGES,
    Limits,
    Register,
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

LIMITS = Limits(start=100.0, lost=20.0, step=50.0)
FACTS: dict[str, dict[str, Any]] = {
    "config": {"config.seed": 0, "config.optimizer.learning_rate": 1e-3},
    "version": {"jax": "0.10.2"},
    "code": {"a.py": "1"},
    "data": {"d": "x"},
}


def arrived(count: int, present: int | None = None) -> Register:
    register = Register(count, LIMITS, now=0.0)
    for index in range(count if present is None else present):
        register.arrived(index, count, f"host{index}", 100 + index, 0.0, now=1.0)
        register.told(index, FACTS, now=1.0)
    return register


def said(register: Register, now: float) -> list[Any]:
    return list(register.decide(now))


def running(count: int = 3) -> Register:
    """All have looked at the storage and were told to go, at second 2."""
    register = arrived(count)
    for stage in STAGES:
        assert said(register, 2.0) == [(list(range(count)), {"probe": stage})]
        assert not said(register, 2.0) or stage
        for index in range(count):
            register.probed(index, stage, "", now=2.0)
    ((to, message),) = said(register, 2.0)
    assert to == list(range(count)) and len(message["go"]) == count
    return register


def beat(
    register: Register,
    now: float,
    steps: dict[int, int],
    phase: str = "training",
    **waited: float,
) -> None:
    for index, step in steps.items():
        register.beat(index, now, step, phase, waited.get(f"p{index}", 0.0))


def verdict(register: Register, now: float) -> tuple[int, str]:
    list(register.decide(now))
    assert register.verdict is not None
    return register.verdict.code, register.verdict.why


def test_who_is_missing_is_said_again_and_again_and_in_the_end() -> None:
    register = arrived(4, present=2)
    for now in (10.0, 20.0):
        ((to, message),) = said(register, now)
        assert (
            to == [0, 1]
            and f"processes 2 and 3 of 4, which did not arrive, for {now:.0f} s" in message["say"]
        )
        beat(register, now, {0: 0, 1: 0}, "starting")
    assert not said(register, 21.0)
    for now in range(21, 101):
        beat(register, float(now), {0: 0, 1: 0}, "starting")
    code, why = verdict(register, 101.0)
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
    register = arrived(3)
    register.told(2, FACTS | {kind: FACTS[kind] | {key: value}}, now=1.0)
    code, why = verdict(register, 2.0)
    assert code == EXIT_BAD_INPUT and why.startswith("process 2 (host2, pid 102)") and words in why


def test_a_clock_that_is_off_is_named() -> None:
    register = Register(2, LIMITS, now=0.0)
    register.arrived(0, 2, "host0", 100, CLOCK_SECONDS / 2, now=1.0)
    assert register.verdict is None
    register.arrived(1, 2, "host1", 101, -3600.0, now=1.0)
    code, why = verdict(register, 1.0)
    assert code == EXIT_BAD_INPUT and "process 1 (host1, pid 101) is 3,600 s ahead of" in why


def test_two_with_one_number_and_another_count_are_refused() -> None:
    twice = arrived(2)
    twice.arrived(1, 2, "host9", 109, 0.0, now=1.0)
    assert "host1" in verdict(twice, 1.0)[1] and "host9" in verdict(twice, 1.0)[1]
    other = arrived(2, present=1)
    other.arrived(1, 3, "host1", 101, 0.0, now=1.0)
    assert "one of 3" in verdict(other, 1.0)[1]


def test_a_stranger_does_not_end_a_run_that_is_complete() -> None:
    register = running()
    register.arrived(1, 3, "host9", 109, 0.0, now=3.0)
    assert not said(register, 3.0) and register.verdict is None


def test_storage_that_one_cannot_use_is_named() -> None:
    register = arrived(2)
    said(register, 2.0)
    register.probed(0, STAGES[0], "", now=2.0)
    register.probed(1, STAGES[0], "cannot write to /runs (Read-only file system): ...", now=2.0)
    assert verdict(register, 2.0) == (
        EXIT_BAD_INPUT,
        "process 1 (host1, pid 101) cannot write to /runs (Read-only file system): ...",
    )


def test_a_broken_connection_and_silence_are_deaths() -> None:
    register = running()
    beat(register, 5.0, {0: 7, 1: 7, 2: 7})
    register.vanished(1, now=6.0)
    assert verdict(register, 6.0) == (
        EXIT_LOST,
        "process 1 (host1, pid 101) died at step 7 (training)",
    )
    silent = running()
    for now in range(3, 24):
        beat(silent, float(now), {0: now, 1: now})
    code, why = verdict(silent, 23.0)
    assert code == EXIT_LOST and why.startswith(
        "process 2 (host2, pid 102) was not heard of for 21 s"
    )


def test_a_death_is_the_reason_for_errors_that_come_before_word_of_it() -> None:
    register = running()
    register.left(0, 1, "JaxRuntimeError: connection reset", now=10.0)
    assert not said(register, 10.0 + SETTLE_SECONDS / 2)
    register.vanished(1, now=10.5)
    assert verdict(register, 10.5)[1].startswith("process 1 (host1, pid 101) died")
    alone = running()
    alone.left(0, 1, "KeyError: 'a'", now=10.0)
    said(alone, 10.0)
    code, why = verdict(alone, 10.0 + SETTLE_SECONDS)
    assert (code, why) == (EXIT_LOST, "process 0 (host0, pid 100) stopped: KeyError: 'a'")


def test_of_several_failures_the_killed_one_is_the_reason_and_all_are_told() -> None:
    register = running()
    for index, code, why in (
        (1, -6, "it was ended by SIGABRT"),
        (0, -9, "it was ended by SIGKILL"),
        (2, 1, "JaxRuntimeError"),
    ):
        register.left(index, code, why, now=10.0)
    assert not said(register, 10.0)
    assert said(register, 10.0 + SETTLE_SECONDS) == [
        (
            [0, 1, 2],
            {
                "end": (
                    EXIT_LOST,
                    "process 0 (host0, pid 100) stopped: it was ended by SIGKILL",
                    0,
                )
            },
        )
    ]


@pytest.mark.parametrize("code", [EXIT_BAD_INPUT, EXIT_NOT_FINITE])
def test_a_users_mistake_ends_all_with_its_code(code: int) -> None:
    register = running()
    register.left(2, code, "the sentence", now=10.0)
    assert verdict(register, 10.0) == (code, "process 2 (host2, pid 102) stopped: the sentence")


def test_a_failed_save_keeps_its_code_where_nobody_died() -> None:
    register = running()
    register.left(0, EXIT_SAVE_FAILED, "no space", now=10.0)
    said(register, 10.0)
    assert verdict(register, 10.0 + SETTLE_SECONDS)[0] == EXIT_SAVE_FAILED


def test_good_ends_end_nobody_else_unless_the_others_stay() -> None:
    register = running()
    for index in (0, 1, 2):
        register.left(index, EXIT_PREEMPTED, "it was asked to", now=10.0)
        register.vanished(index, now=11.0)
    assert not said(register, 100.0) and register.verdict is None
    staying = running()
    staying.left(0, EXIT_PREEMPTED, "it was asked to", now=10.0)
    for now in range(10, 32):
        beat(staying, float(now), {1: now, 2: now})
    code, why = verdict(staying, 31.0)
    assert code == EXIT_PREEMPTED and why.startswith(
        "process 0 (host0, pid 100) ended at step 0, and others did not"
    )


def test_those_who_meet_go_on_together() -> None:
    register = running()
    for index in (0, 2):
        register.meets(index, "here", now=5.0)
    assert not said(register, 5.0)
    register.meets(1, "here", now=6.0)
    assert said(register, 6.0) == [([0, 1, 2], {"met": "here"})]
    assert not said(register, 7.0)
    for index in (1, 0, 2):
        register.meets(index, "here", now=8.0)
    assert said(register, 8.0) == [([0, 1, 2], {"met": "here"})]


def test_who_waits_in_one_place_does_not_answer_for_another() -> None:
    register = running(2)
    register.meets(0, "saving step 2", now=5.0)
    register.meets(1, "the first step", now=5.0)
    assert not said(register, 5.0)
    register.meets(1, "saving step 2", now=6.0)
    assert said(register, 6.0) == [([0, 1], {"met": "saving step 2"})]
    register.meets(0, "the first step", now=6.0)
    assert said(register, 6.0) == [([0, 1], {"met": "the first step"})]


def all_alive(register: Register, now: float, count: int = 2) -> None:
    """The signs of life of their supervisors."""
    for index in range(count):
        register.beat(index, now)


def test_nobody_is_lost_while_one_saves_nor_after_all_met_at_the_end() -> None:
    register = running(2)
    beat(register, 5.0, {0: 4, 1: 4})
    register.left(1, 0, "it was asked to", now=6.0)
    for now in range(6, 600):
        all_alive(register, now)
        register.works(0, "saving step 4", now=now)
        assert not said(register, now) and register.verdict is None
    done = running(2)
    for index in (0, 1):
        done.meets(index, END, now=6.0)
    assert said(done, 6.0) == [([0, 1], {"met": END})]
    done.left(1, 0, "it was asked to", now=6.0)
    for now in range(6, 600):
        all_alive(done, now)
        assert not said(done, now) and done.verdict is None


def test_a_run_that_one_has_left_before_the_end_is_no_finished_one() -> None:
    register = running(2)
    register.left(1, 0, "it was asked to", now=6.0)
    for now in range(6, 28):
        all_alive(register, now)
    code, why = verdict(register, 27.0)
    assert code == EXIT_LOST and why.startswith(
        "process 1 (host1, pid 101) ended at step 0, and others did not"
    )


@pytest.mark.parametrize("what", ["saving step 4", "verifying step 4"])
def test_what_gets_on_is_not_hung_and_what_does_not_is_named(what: str) -> None:
    """Others wait for it meanwhile, in a phase of their own that does not change."""
    register = running(2)
    if what.startswith("saving"):
        beat(register, 3.0, {0: 4, 1: 4}, "save")
    register.meets(1, "there", now=3.0)
    for now in range(3, 300):
        all_alive(register, now)
        register.works(0, what, now=now)
        assert not said(register, now) and register.verdict is None
    for now in range(300, 352):
        all_alive(register, now)
    code, why = verdict(register, 351.0)
    assert (
        code == EXIT_HUNG
        and f"process 0 (host0, pid 100) is at step {4 * what.startswith('saving')} ({what})" in why
    )


def test_one_that_still_reads_before_its_first_step_does_not_hang_who_waits_for_it() -> None:
    register = running(2)
    beat(register, 3.0, {1: 0}, "compile")
    register.meets(1, "the first step", now=3.0)
    for now in range(3, 300):
        all_alive(register, now)
        assert not said(register, now) and register.verdict is None


def test_storage_that_does_not_answer_is_named_in_the_end() -> None:
    register = arrived(2)
    said(register, 2.0)
    register.probed(0, STAGES[0], "", now=2.0)
    for now in range(2, 102):
        all_alive(register, now)
    code, why = verdict(register, 101.0)
    assert code == EXIT_ABSENT and "process 1 (host1, pid 101) to look at the storage" in why


def test_a_hung_step_names_the_one_behind() -> None:
    register = running()
    beat(register, 10.0, {0: 5, 1: 4, 2: 5})
    for now in range(10, 61):
        for index in range(3):
            register.beat(index, float(now))
    assert register.verdict is None
    code, why = verdict(register, 61.0)
    assert (
        code == EXIT_HUNG
        and "process 1 (host1, pid 101) is at step 4 (training), others are at step 5" in why
        and "51 s" in why
    )


def test_who_waits_for_data_or_is_late_is_named_once_a_look() -> None:
    register = running()
    for step in range(1, 31):
        now = 2.0 + step
        for index in range(3):
            register.beat(index, now, step, "training", 0.5 * step if index == 2 else 0.01 * step)
    ((to, message),) = said(register, 2.0 + LOOK_EVERY)
    assert to == [0] and message["say"].startswith(
        "process 2 (host2, pid 102) holds the others up: 50% of the time it waits for its data"
    )
    assert not said(register, 2.5 + LOOK_EVERY)

    late = running()
    for step in range(1, 30):
        for index in range(3):
            late.beat(index, 2.0 + step + (0.4 if index == 1 else 0.0), step, "training", 0.0)
    ((_, message),) = said(late, 2.0 + LOOK_EVERY)
    assert message["say"].startswith(
        "process 1 (host1, pid 101) holds the others up: 40% of the time it comes later"
    )
