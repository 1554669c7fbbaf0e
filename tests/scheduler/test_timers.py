"""Which moments of a timer are carried out, and which are left out and why."""

from __future__ import annotations

import pytest

from tabane.reactions import Trigger
from tabane.scheduler.timers import LATE_S, Fire, Mark, Skip, after, decide, finished

EVERY = Trigger(cron="*/5 * * * *")
BASE = 1_700_000_100.0
"""2023-11-14 22:15:00 UTC, a moment of `EVERY`."""


def test_nothing_is_due_between_moments() -> None:
    assert decide(EVERY, Mark(last=BASE), 0.0, BASE + 299.9) is None


def test_one_that_has_come_is_carried_out_once() -> None:
    mark = Mark(last=BASE - 300)
    decision = decide(EVERY, mark, 0.0, BASE)
    assert decision == Fire(BASE)
    mark = after(mark, decision, BASE)
    assert mark == Mark(last=BASE, pending=(BASE,))
    assert decide(EVERY, mark, 0.0, BASE + 1) is None


def test_moments_before_the_deployment_do_not_count() -> None:
    assert decide(EVERY, Mark(), BASE, BASE + 1) is None
    assert decide(EVERY, Mark(), BASE - 1, BASE + 1) == Fire(BASE)


@pytest.mark.parametrize("late_s", [0.0, LATE_S])
def test_a_little_late_is_not_missed(late_s: float) -> None:
    assert decide(EVERY, Mark(last=BASE - 300), 0.0, BASE + late_s) == Fire(BASE)


def test_missed_moments_are_left_out_or_carried_out_as_one() -> None:
    mark, now = Mark(last=BASE - 86400), BASE + LATE_S + 1
    assert decide(EVERY, mark, 0.0, now) == Skip(BASE, "missed: the control node was away")
    once = Trigger(cron=EVERY.cron, missed="once")
    decision = decide(once, mark, 0.0, now)
    assert decision == Fire(BASE)
    assert decide(once, after(mark, decision, now), 0.0, now) is None


def test_one_that_comes_while_the_one_before_goes_on() -> None:
    mark = Mark(last=BASE - 300, pending=(BASE - 300,))
    decision = decide(EVERY, mark, 0.0, BASE)
    assert isinstance(decision, Skip)
    left = after(mark, decision, BASE)
    assert (left.last, left.pending) == (BASE, (BASE - 300,))
    assert left.outcome.startswith("left out: ")
    allowed = Trigger(cron=EVERY.cron, overlap="allow")
    assert decide(allowed, mark, 0.0, BASE) == Fire(BASE)


def test_what_is_finished_is_pending_no_more() -> None:
    mark = Mark(last=BASE, pending=(BASE - 300, BASE))
    done = finished(mark, BASE - 300, "answered 200", BASE + 3)
    assert done == Mark(last=BASE, pending=(BASE,), at=BASE + 3, outcome="answered 200")
