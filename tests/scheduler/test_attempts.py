"""What follows from dumps and restores that fail, by virtual moments."""

from __future__ import annotations

from tabane.scheduler.attempts import DUMP_FIRST_S, DUMP_LAST_S, RESTORES, Attempts


def test_at_first_nothing_is_in_the_way() -> None:
    attempts = Attempts()
    assert attempts.dump_in_s(0.0) == 0.0 and attempts.may_restore(0.0)
    assert attempts.describe() == ""


def test_dumps_that_fail_are_tried_again_after_pauses_that_double_up_to_a_bound() -> None:
    attempts, now, pauses = Attempts(), 0.0, []
    for _ in range(20):
        attempts.on_dump_failed("it is busy", now)
        pause_s = attempts.dump_in_s(now)
        assert pause_s is not None
        pauses.append(pause_s)
        now += pause_s
    assert pauses[:3] == [DUMP_FIRST_S, 2 * DUMP_FIRST_S, 4 * DUMP_FIRST_S]
    assert pauses[-1] == DUMP_LAST_S
    assert attempts.describe() == "starts without a checkpoint: it is busy"
    attempts.on_dumped()
    assert attempts.describe() == "" and attempts.dump_in_s(now) == 0.0


def test_what_never_can_be_is_not_tried_again() -> None:
    attempts = Attempts()
    attempts.on_dump_failed("it has volumes", 0.0, final=True)
    assert attempts.dump_in_s(1e9) is None


def test_after_a_restore_that_failed_the_next_begin_cold_for_a_while() -> None:
    attempts = Attempts()
    assert not attempts.on_restore_failed("it is deaf", 0.0, 1.0)
    assert not attempts.may_restore(1.9) and attempts.may_restore(2.0)
    attempts.on_restored()
    assert attempts.may_restore(0.0) and attempts.describe() == ""


def test_those_that_began_together_fail_once() -> None:
    attempts = Attempts()
    assert [attempts.on_restore_failed("it is deaf", 0.0, 1.0) for _ in range(10)] == [False] * 10
    assert attempts.restores == 1


def test_after_some_in_a_row_it_is_discarded_and_another_comes_later_each_time() -> None:
    attempts, now, pauses = Attempts(), 0.0, []
    for _ in range(3):
        discards = []
        for _ in range(RESTORES):
            now += 100.0
            discards.append(attempts.on_restore_failed("it is deaf", now - 1.0, now))
        assert discards == [False] * (RESTORES - 1) + [True]
        pauses.append(attempts.dump_in_s(now))
        attempts.on_dumped()
    assert pauses == [DUMP_FIRST_S, 2 * DUMP_FIRST_S, 4 * DUMP_FIRST_S]
