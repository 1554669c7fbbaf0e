"""What fails, and what cannot be reached."""

import pytest

from tabane.gateway.activation import SUSPECT_S, GatewayGone, GatewayJoined
from tabane.gateway.messages import Broken, Refuse
from tabane.gateway.setbacks import BACKOFF_FIRST_S, BACKOFF_LAST_S, HEALTHY_S, RETRY_S
from tabane.model import InstanceId
from tabane.testing.home import Decided, HandledHome

I1 = InstanceId("i1")


def held(**reactive: object) -> HandledHome:
    """`i1` is ready, `g1` holds a slot of it."""
    home = HandledHome(**reactive)
    home.demand("g1", 1)
    home.ready("i1")
    return home


def broken(home: HandledHome, gateway: str = "g1", *, reached: bool = False) -> Decided:
    reason = "it broke off" if reached else "connection refused"
    return home.hear(gateway, Broken(home.app.key, I1, reason, reached))


# Starts that fail


def test_a_start_that_failed_once_is_tried_again_and_nobody_is_refused() -> None:
    home = HandledHome()
    home.demand("g1", 3)
    decided = home.ended("i1")
    assert (decided.starts, decided.refusals) == ([], [])
    assert home.wait(RETRY_S + 0.01).starts == ["i2"]
    assert home.ready("i2").grants == [("g1", "i2", 3)]


def test_after_the_second_failure_those_who_wait_are_told_why_and_when_to_retry() -> None:
    home = HandledHome()
    home.demand("g1", 3)
    home.ended("i1")
    home.wait(1)
    ((gateway, refuse),) = home.ended("i2", "exited with code 7").told(Refuse)
    assert (gateway, refuse.kind, refuse.sessions) == ("g1", "broken", 3)
    assert refuse.reason == "did not start twice: exited with code 7; next try in 1 s"
    assert refuse.retry_after_s == pytest.approx(2 * BACKOFF_FIRST_S)


def paused(start_timeout_s: float) -> HandledHome:
    """Two starts failed; the pause has 0.75 s to go."""
    home = HandledHome(start_timeout_s=start_timeout_s)
    home.demand("g1", 1)
    home.ended("i1")
    home.wait(1)
    home.ended("i2")
    home.wait(0.25)
    return home


def test_newcomers_wait_for_the_end_of_a_pause_that_comes_in_time() -> None:
    home = paused(start_timeout_s=10.0)
    assert home.demand("g2", 2) == []
    assert home.wait(0.7) == []
    assert home.wait(0.1).starts == ["i3"]
    assert home.ready("i3").grants == [("g2", "i3", 2)]


def test_newcomers_are_refused_at_once_when_the_pause_ends_too_late() -> None:
    home = paused(start_timeout_s=0.7)
    ((_, refuse),) = home.demand("g2", 2).told(Refuse)
    assert (refuse.kind, refuse.sessions, refuse.waited_s) == ("paused", 2, 0.0)
    assert refuse.retry_after_s == pytest.approx(0.75)
    assert home.wait(3600) == []


def test_of_those_who_wait_only_those_who_cannot_wait_longer_are_refused() -> None:
    """At a gateway the first has waited 0.5 s of 1 s, and the pause takes 0.75 s more."""
    home = paused(start_timeout_s=1.0)
    ((_, refuse),) = home.demand("g2", 2, waited_s=0.5).told(Refuse)
    assert (refuse.kind, refuse.sessions) == ("broken", 2), "it came before the last failure"
    assert refuse.waited_s == pytest.approx(0.25)
    assert home.demand("g2", 1, waited_s=0.1) == []
    assert home.wait(0.8).starts == ["i3"]


def test_nobody_waits_for_what_would_end_the_same_way() -> None:
    home = HandledHome()
    home.demand("g1", 1)
    home.ended("i1", "its image has no program", retry=False)
    assert home.demand("g2", 1).refusals == [("g2", "paused", 1)]


def test_the_pause_grows_to_a_limit_and_lets_one_trial_through_at_a_time() -> None:
    home = HandledHome(concurrency=1, max=9)
    pauses = []
    for _ in range(12):
        (instance,) = home.demand("g1", 1).starts
        if pauses:
            assert home.demand("g2", 5).starts == []
        home.ended(instance)
        pauses.append(home.ledger.setbacks.blocked_until - home.now)
        home.demand("g1", 0)
        home.demand("g2", 0)
        home.wait(pauses[-1] + 0.01)
    assert pauses[0] == pytest.approx(RETRY_S)
    assert pauses[1:6] == pytest.approx([BACKOFF_FIRST_S * 2**n for n in range(1, 6)])
    assert pauses[-1] == pytest.approx(BACKOFF_LAST_S)


def test_a_start_that_would_fail_the_same_way_is_not_tried_again_at_once() -> None:
    home = HandledHome()
    home.demand("g1", 1)
    decided = home.ended("i1", "it did not listen", retry=False)
    assert decided.refusals == [("g1", "broken", 1)]
    assert home.ledger.setbacks.blocked_until > home.now + RETRY_S


def test_starts_that_fail_together_count_once() -> None:
    home = HandledHome(concurrency=1, max=20)
    home.prove()
    for instance in home.demand("g1", 20).starts:
        assert home.ended(instance).refusals == []
    assert home.ledger.setbacks.count == 1
    assert home.wait(RETRY_S + 0.01).starts == ["i21"]


def test_one_start_of_many_that_fails_is_made_again_when_another_is_ready() -> None:
    home = HandledHome(concurrency=1, max=3)
    home.demand("g1", 3)
    assert home.ended("i1").starts == []
    assert home.ready("i2").starts == ["i4"]


def test_once_a_trial_is_ready_all_that_is_missing_starts() -> None:
    home = HandledHome(concurrency=1, max=9)
    home.demand("g1", 5)
    for number in range(1, 6):
        home.ended(f"i{number}")
    (trial,) = home.wait(RETRY_S + 0.01).starts
    assert len(home.ready(trial).starts) == 4


def test_an_app_that_dies_soon_after_it_is_ready_is_started_ever_more_rarely() -> None:
    home = HandledHome(stop_after_s=1000.0)
    starts = 0
    home.demand("g1", 1)
    for _ in range(600):
        for holding in home.ledger.starting():
            starts += 1
            home.ready(holding.id)
        home.wait(0.05)
        for holding in home.ledger.serving():
            home.ended(holding.id)
        home.returned("g1", f"i{starts}", 1)
        home.demand("g1", 1)
        home.wait(0.05)
    assert 5 <= starts <= 10


def test_failures_are_forgotten_once_an_instance_stayed_healthy() -> None:
    home = HandledHome(stop_after_s=1000.0, concurrency=1, max=9)
    home.demand("g1", 1)
    home.ended("i1")
    home.wait(1)
    home.ended("i2")
    home.wait(2)
    home.demand("g1", 1)
    home.ready("i3")
    assert home.ledger.setbacks.count == 2
    home.wait(HEALTHY_S)
    home.demand("g1", 0)
    assert (home.ledger.setbacks.count, home.ledger.setbacks.reason) == (0, "")


def test_failures_are_forgotten_when_an_instance_ends_as_it_was_told_to() -> None:
    home = HandledHome(stop_after_s=1.0)
    home.demand("g1", 1)
    home.ended("i1")
    home.wait(1)
    home.ready("i2")
    home.returned("g1", "i2", 1)
    home.wait(2)
    home.stopped("i2")
    assert home.ledger.setbacks.count == 0


def test_the_end_of_one_that_served_is_no_setback() -> None:
    home = HandledHome(stop_after_s=1000.0)
    home.demand("g1", 1)
    home.ended("i1")
    home.wait(1)
    home.ready("i2")
    home.wait(HEALTHY_S)
    home.ended("i2", "killed by SIGKILL")
    assert home.ledger.setbacks.count == 0
    assert home.demand("g1", 1).starts == ["i3"]


def test_the_first_that_ends_soon_after_it_was_ready_is_replaced_at_once() -> None:
    home = held(stop_after_s=1000.0)
    home.wait(1)
    home.ended("i1", "killed by SIGTERM")
    home.returned("g1", "i1", 1)
    assert home.ledger.setbacks.describe(home.now) == (
        "ended right after its start once: killed by SIGTERM"
    )
    assert home.demand("g1", 1).starts == ["i2"]


def test_who_meets_early_ends_waits_as_long_as_that_is_in_time() -> None:
    home = HandledHome(stop_after_s=1000.0)
    home.demand("g1", 1)
    for number, pause_s in enumerate((0.0, 1.0, 2.0, 4.0, 8.0), 1):
        home.ready(f"i{number}")
        home.wait(1)
        home.ended(f"i{number}", "killed by SIGKILL")
        assert home.returned("g1", f"i{number}", 1).refusals == []
        decided = home.demand("g1", 1) + home.wait(pause_s)
        assert Decided(decided).starts == [f"i{number + 1}"]
    home.ready("i6")
    home.ended("i6", "killed by SIGKILL")
    home.returned("g1", "i6", 1)
    ((_, refuse),) = home.demand("g1", 1).told(Refuse)
    assert refuse.reason == (
        "ended right after its start 6 times: killed by SIGKILL; next try in 16 s"
    )


def test_what_is_ready_from_before_an_early_end_does_not_end_the_pause() -> None:
    home = HandledHome(concurrency=1, max=3, stop_after_s=1000.0)
    assert home.demand("g1", 3).starts == ["i1", "i2", "i3"]
    home.ready("i1")
    home.ended("i1")
    home.returned("g1", "i1", 1)
    home.demand("g1", 3)
    assert home.ready("i2").starts == ["i4"]
    home.ready("i4")
    home.ended("i4")
    assert home.ledger.setbacks.left_s(home.now) == pytest.approx(1.0)
    home.ready("i3")
    assert home.ledger.setbacks.left_s(home.now) == pytest.approx(1.0)


def test_an_end_that_was_ordered_is_no_setback() -> None:
    home = held(stop_after_s=1000.0)
    for number in range(1, 9):
        home.stopped(f"i{number}")
        home.returned("g1", f"i{number}", 1)
        assert home.demand("g1", 1).starts == [f"i{number + 1}"]
        home.ready(f"i{number + 1}")


def test_failures_are_forgotten_without_anything_else_happening() -> None:
    home = HandledHome(stop_after_s=1000.0)
    home.demand("g1", 1)
    home.ended("i1")
    home.wait(1)
    home.ready("i2")
    home.wait(HEALTHY_S)
    assert home.ledger.setbacks.describe(home.now) == ""


def test_healthy_instances_from_before_do_not_hide_new_failures() -> None:
    home = held(stop_after_s=1000.0, concurrency=1, max=3)
    home.wait(HEALTHY_S * 2)
    for _ in range(3):
        home.demand("g1", 1)
        home.wait(60)
        (trial,) = home.ledger.starting()
        home.ended(trial.id)
    assert home.ledger.setbacks.count == 3


def test_while_something_serves_those_who_wait_are_not_refused() -> None:
    home = held(stop_after_s=1000.0, concurrency=1, max=2, start_timeout_s=1000.0)
    for _ in range(4):
        home.demand("g1", 1)
        home.wait(60)
        (trial,) = home.ledger.starting()
        assert home.ended(trial.id, retry=False).refusals == []
    assert home.returned("g1", "i1", 1).grants == [("g1", "i1", 1)]


def test_what_fails_while_it_is_stopped_is_no_failure() -> None:
    home = held(stop_after_s=1.0)
    home.returned("g1", "i1", 1)
    assert list(home.wait(2).stops) == ["i1"]
    home.ended("i1", "killed by SIGKILL")
    assert home.ledger.setbacks.count == 0


def test_a_new_revision_begins_without_failures() -> None:
    home = HandledHome()
    home.demand("g1", 1)
    home.ended("i1")
    home.wait(1)
    home.ended("i2")
    home.redeploy()
    assert home.demand("g1", 1).starts == ["i3"]


def test_the_old_revision_serves_on_while_the_new_one_does_not_start() -> None:
    home = held(stop_after_s=1000.0, concurrency=2, max=1)
    (trial,) = home.redeploy().starts
    for _ in range(4):
        assert home.ended(trial, retry=False).refusals == []
        assert home.demand("g2", 1).grants == [("g2", "i1", 1)]
        home.returned("g2", "i1", 1)
        (trial,) = home.wait(60).starts
    assert home.ready(trial).revokes == [("g1", "i1", None)]


def test_a_failure_of_the_old_revision_does_not_hold_up_the_new_one() -> None:
    home = held(max=1)
    home.redeploy()
    home.ended("i1")
    assert home.ledger.setbacks.count == 0
    assert home.ready("i2").stops == {}


# Instances that end or cannot be reached


def test_the_address_of_what_ended_is_kept_until_all_slots_are_back() -> None:
    home = held(concurrency=2, max=1)
    home.demand("g2", 1)
    decided = home.ended("i1")
    assert decided.revokes == [("g1", "i1", None), ("g2", "i1", None)]
    assert decided.releases == []
    assert home.returned("g1", "i1", 1).releases == []
    assert home.returned("g2", "i1", 1).releases == ["i1"]


def test_the_address_is_kept_while_a_gateway_is_silent() -> None:
    home = held()
    home.returned("g1", "i1", 1)
    home.handle(GatewayJoined("g2"))
    assert home.ended("i1").releases == []
    assert home.report("g2", i1=1).revokes == [("g2", "i1", None)]
    assert home.returned("g2", "i1", 1).releases == ["i1"]


def test_an_end_that_is_told_twice_releases_again_and_counts_once() -> None:
    home = held()
    home.returned("g1", "i1", 1)
    assert home.ended("i1").releases == ["i1"]
    assert home.ended("i1").releases == ["i1"]
    assert home.ledger.setbacks.count == 1


def test_what_could_not_be_reached_gets_no_sessions_for_a_while() -> None:
    home = held(concurrency=5, max=1, stop_after_s=1000.0)
    broken(home)
    assert home.demand("g2", 1).grants == []
    assert home.wait(SUSPECT_S - 0.1).grants == []
    assert home.wait(0.2).grants == [("g2", "i1", 1)]


def test_another_is_started_while_one_cannot_be_reached() -> None:
    home = held(concurrency=5, max=2)
    broken(home)
    home.returned("g1", "i1", 1)
    assert home.demand("g1", 1).starts == ["i2"]


def test_nothing_is_started_because_answers_break_off() -> None:
    home = held(concurrency=5, max=9, stop_after_s=1000.0)
    for _ in range(20):
        assert broken(home, reached=True) == []
        home.returned("g1", "i1", 1)
        decided = home.demand("g1", 1)
        assert (decided.starts, decided.grants) == ([], [("g1", "i1", 1)])


def test_sessions_go_to_what_broke_no_answer_off_as_long_as_it_has_room() -> None:
    home = held(concurrency=2, max=2, stop_after_s=1000.0)
    home.demand("g1", 2)
    home.ready("i2")
    home.returned("g1", "i1", 2)
    home.returned("g1", "i2", 1)
    broken(home, reached=True)
    assert home.demand("g2", 3).grants == [("g2", "i2", 2), ("g2", "i1", 1)]
    home.returned("g2", "i1", 1)
    home.wait(SUSPECT_S)
    home.returned("g2", "i2", 2)
    assert home.demand("g2", 1).grants == [("g2", "i1", 1)]


def test_what_cannot_be_reached_any_more_gets_no_sessions_although_it_was_before() -> None:
    home = held(concurrency=5, max=1, stop_after_s=1000.0)
    broken(home, reached=True)
    broken(home)
    assert home.demand("g2", 1).grants == []


def test_words_about_what_is_gone_change_nothing() -> None:
    home = HandledHome()
    assert broken(home) == []
    assert home.returned("g1", "i1", 3) == []
    assert home.still_used("g1", "i1") == []


def test_more_slots_given_back_than_held_are_none_held() -> None:
    home = held(concurrency=5)
    home.returned("g1", "i1", 3)
    assert home.demand("g1", 5).grants == [("g1", "i1", 5)]


def test_a_ready_that_is_told_twice_changes_nothing() -> None:
    home = held()
    assert home.ready("i1") == []
    assert home.ledger.instances[I1].granted == {"g1": 1}


def test_what_was_believed_lost_and_is_ready_after_all_serves() -> None:
    home = HandledHome(max=1)
    home.demand("g1", 1)
    home.handle(GatewayJoined("silent"))
    home.ended("i1", "its node could not be told to start it")
    home.ready("i1")
    assert home.report("silent").grants == [("g1", "i1", 1)]


def test_a_stop_that_was_lost_is_told_again() -> None:
    home = held(stop_after_s=1.0)
    home.returned("g1", "i1", 1)
    assert list(home.wait(2).stops) == ["i1"]
    decided = home.ready("i1")
    assert list(decided.stops) == ["i1"]
    assert home.demand("g1", 1).starts == ["i2"]


def test_a_stop_that_was_lost_waits_for_sessions_that_came_back_meanwhile() -> None:
    home = held(stop_after_s=1.0)
    home.handle(GatewayGone("g1"))
    assert list(home.wait(2).stops) == ["i1"]
    home.handle(GatewayJoined("g1"))
    assert home.ready("i1").stops == {}
    assert home.report("g1", i1=1).revokes == [("g1", "i1", None)]
    assert list(home.returned("g1", "i1", 1).stops) == ["i1"]
