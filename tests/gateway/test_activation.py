"""Who gets a slot, what starts, what stops; see also `test_activation_revisions`, `_faults`."""

import pytest

from tabane.gateway.activation import (
    REST_S,
    AppChanged,
    FloorChanged,
    GatewayGone,
    GatewayJoined,
    Start,
    StopAsked,
)
from tabane.gateway.decisions import (
    CROWDED_AGAIN_S,
    CROWDED_S,
    RECALL_S,
    STARTING_AT_ONCE,
    UNPROVEN_AT_ONCE,
)
from tabane.gateway.messages import Grant, Refuse, StartTrace, StillUsed
from tabane.model import App, InstanceId
from tabane.testing.home import NODE, HandledHome


def running(*gateways: str, **reactive: object) -> HandledHome:
    """`i1` is ready; each of the gateways holds one slot of it."""
    home = HandledHome(**reactive)
    home.demand("first", 1)
    home.ready("i1")
    home.returned("first", "i1", 1)
    for gateway in gateways:
        assert home.demand(gateway, 1).grants == [(gateway, "i1", 1)]
    return home


def floor(home: HandledHome, count: int) -> FloorChanged:
    return FloorChanged(home.app.key, count)


# Starts


def test_an_app_nobody_asks_for_runs_nowhere() -> None:
    home = HandledHome()
    assert home.wait(3600) == []
    assert home.activation.next_due() is None


def test_the_first_session_starts_one_instance_at_once() -> None:
    home = HandledHome()
    assert home.demand("g1", 1) == [Start(home.app, InstanceId("i1"), NODE)]


def test_sessions_that_one_start_will_serve_start_nothing_more() -> None:
    home = HandledHome(concurrency=10)
    home.demand("g1", 1)
    assert home.demand("g1", 4) == []
    assert home.demand("g2", 6) == []
    assert home.demand("g2", 7).starts == ["i2"]


def test_of_very_many_instances_only_so_many_start_at_a_time() -> None:
    home = HandledHome(max=1_000_000)
    home.prove()
    starts = home.handle(floor(home, 1_000_000)).starts
    assert len(starts) == STARTING_AT_ONCE
    assert home.wait(5) == []
    assert len(home.ready(starts[0]).starts) == 1


def test_one_instance_for_each_concurrency_sessions_and_never_above_max() -> None:
    home = HandledHome(concurrency=10, max=20)
    home.prove()
    assert len(home.demand("g1", 95).starts) == 10
    assert len(home.demand("g1", 5000).starts) == 10
    assert home.wait(10) == []


def test_of_a_new_revision_a_few_are_tried_before_the_others_are_started() -> None:
    home = HandledHome(concurrency=1, max=100)
    assert len(home.demand("g1", 100).starts) == UNPROVEN_AT_ONCE
    assert home.wait(5) == []
    assert len(home.ready("i1").starts) == 100 - UNPROVEN_AT_ONCE
    home.redeploy()
    assert home.ledger.proven < home.app.revision


def test_when_it_is_ready_those_who_wait_get_its_slots_the_longest_waiting_first() -> None:
    home = HandledHome(concurrency=10, max=1)
    home.demand("late", 8, waited_s=1.0)
    home.demand("early", 6, waited_s=2.0)
    assert home.ready("i1").grants == [("early", "i1", 6), ("late", "i1", 4)]


def test_a_grant_says_where_and_what_the_start_cost_to_those_who_waited_for_it() -> None:
    home = HandledHome(concurrency=10)
    trace = StartTrace({"engine": 5_000}, 9_000)
    home.demand("g1", 2)
    ((_, grant),) = home.ready("i1", trace=trace).told(Grant)
    assert (grant.address, grant.port, grant.revision, grant.node) == ("10.0.0.1", 8000, 1, NODE)
    assert grant.generation == home.instance("i1").generation
    assert (grant.slots, grant.answered, grant.epoch) == (2, 2, home.epoch)
    assert grant.trace == trace
    ((_, later),) = home.demand("g1", 1).told(Grant)
    assert later.trace is None
    assert later.answered == 3


def test_free_slots_are_granted_without_a_start() -> None:
    home = running("g1", concurrency=2)
    decided = home.demand("g2", 1)
    assert (decided.grants, decided.starts) == ([("g2", "i1", 1)], [])


def test_a_slot_on_its_way_is_not_granted_twice() -> None:
    home = running(concurrency=10)
    assert home.demand("g1", 3).grants == [("g1", "i1", 3)]
    assert home.demand("g1", 3, seen=0) == []
    assert home.demand("g1", 5, seen=0).grants == [("g1", "i1", 2)]
    assert home.demand("g1", 1, seen=5).grants == [("g1", "i1", 1)]


def test_sessions_that_gave_up_start_nothing() -> None:
    home = HandledHome(concurrency=1, max=5)
    home.demand("g1", 2)
    home.demand("g1", 0)
    assert home.ready("i1").grants == []
    assert home.demand("g1", 1).grants == [("g1", "i1", 1)]


def test_a_slot_given_back_goes_to_who_waits() -> None:
    home = running("g1", concurrency=1, max=1)
    home.demand("g2", 1)
    assert home.returned("g1", "i1", 1).grants == [("g2", "i1", 1)]


def test_packs_sessions_onto_the_oldest_instance() -> None:
    home = HandledHome(concurrency=2, max=2)
    home.demand("g1", 3)
    home.ready("i1")
    home.ready("i2")
    home.returned("g1", "i1", 2)
    home.returned("g1", "i2", 1)
    assert home.demand("g2", 3).grants == [("g2", "i1", 2), ("g2", "i2", 1)]


def test_an_app_without_a_port_takes_no_sessions() -> None:
    home = HandledHome(App(name="worker", image="host", revision=1))
    assert home.demand("g1", 2).refusals == [("g1", "gone", 2)]
    assert home.handle(floor(home, 1)).starts == ["i1"]
    home.ready("i1")
    assert home.wait(3600) == []


def test_a_removed_port_refuses_those_who_wait() -> None:
    home = HandledHome(max=1, concurrency=1)
    home.demand("g1", 2)
    assert home.redeploy(port=None).refusals == [("g1", "gone", 2)]
    home.ready("i2")
    assert home.wait(10).grants == []


def test_where_nothing_can_run_it_sessions_are_sent_elsewhere() -> None:
    home = HandledHome()
    home.node = None
    ((gateway, refuse),) = home.demand("g1", 2).told(Refuse)
    assert (gateway, refuse.kind, refuse.sessions) == ("g1", "elsewhere", 2)
    assert "no node of this data center can run default/hello now (n1: is full)" in refuse.reason
    assert refuse.retry_after_s > 0
    assert home.wait(REST_S - 1) == []
    home.node = NODE
    assert home.demand("g1", 1).starts == ["i1"]


def test_where_only_memory_is_missing_sessions_wait_for_some_of_it() -> None:
    home = HandledHome()
    home.node, home.crowded = None, True
    assert home.demand("g1", 2) == []
    home.wait(CROWDED_S / 2)
    assert home.demand("g2", 1) == []
    home.node = NODE
    assert home.wait(CROWDED_AGAIN_S).starts == ["i1"]


def test_where_memory_stays_short_those_who_waited_long_are_told_so() -> None:
    home = HandledHome()
    home.node, home.crowded = None, True
    home.demand("g1", 2)
    assert home.wait(CROWDED_S / 2) == []
    home.demand("g2", 1)
    decided = home.wait(CROWDED_S / 2 + CROWDED_AGAIN_S)
    assert decided.refusals == [("g1", "elsewhere", 2)]
    ((_, refuse),) = decided.told(Refuse)
    assert refuse.waited_s == CROWDED_S
    assert home.wait(CROWDED_S / 2).refusals == [("g2", "elsewhere", 1)]
    assert home.wait(REST_S - 1) == []


def test_where_nothing_more_can_run_sessions_wait_for_what_does() -> None:
    home = running("g1", concurrency=1, max=5)
    home.node = None
    home.demand("g2", 1)
    assert home.wait(5).refusals == []
    assert home.returned("g1", "i1", 1).grants == [("g2", "i1", 1)]


# Slots that others hold


def test_unused_slots_of_others_are_asked_for_before_anything_starts() -> None:
    home = running("g1", concurrency=1, max=5)
    assert home.demand("g2", 1).revokes == [("g1", "i1", 0.0)]
    decided = home.returned("g1", "i1", 1)
    assert (decided.starts, decided.grants) == ([], [("g2", "i1", 1)])


def test_when_others_use_all_their_slots_it_starts_at_once() -> None:
    home = running("g1", concurrency=1, max=5)
    home.demand("g2", 1)
    assert home.still_used("g1", "i1").starts == ["i2"]


def test_a_gateway_that_does_not_answer_delays_a_start_for_a_moment_only() -> None:
    home = running("g1", concurrency=1, max=5)
    assert home.demand("g2", 1).starts == []
    assert home.wait(RECALL_S - 0.01).starts == []
    assert home.wait(0.02).starts == ["i2"]


def test_a_gateway_that_waits_itself_is_not_asked_for_its_own_sake() -> None:
    home = running("g1", concurrency=1, max=5)
    decided = home.demand("g1", 1)
    assert (decided.revokes, decided.starts) == ([], ["i2"])


def test_at_max_who_waits_gets_the_next_slot_that_comes_free_elsewhere() -> None:
    home = running("g1", concurrency=1, max=1)
    assert home.demand("g2", 1).revokes == [("g1", "i1", 0.0)]
    assert home.still_used("g1", "i1") == []
    assert home.wait(5) == []
    assert home.returned("g1", "i1", 1).grants == [("g2", "i1", 1)]


def test_a_gateway_is_asked_once_for_the_next_slot_until_it_gave_one() -> None:
    home = running("g1", concurrency=10, max=1)
    home.demand("g1", 9)
    assert home.demand("g2", 3).revokes == [("g1", "i1", 0.0)]
    home.still_used("g1", "i1")
    assert home.wait(5) == []
    decided = home.returned("g1", "i1", 1)
    assert decided.grants == [("g2", "i1", 1)]
    assert decided.revokes == [("g1", "i1", 0.0)]


def test_who_begins_to_wait_between_two_rounds_of_questions_is_not_forgotten() -> None:
    home = running("g1", concurrency=2, max=1)
    home.demand("g1", 1)
    home.wait(1)
    home.demand("g2", 1)
    home.returned("g1", "i1", 1)
    assert home.demand("g3", 1).revokes == []
    assert sorted(home.wait(RECALL_S + 0.01).revokes) == [("g1", "i1", 0.0), ("g2", "i1", 0.0)]


def test_a_busy_gateway_gives_slots_to_one_whose_sessions_wait_longer() -> None:
    """Or else a gateway that always has sessions of its own would keep its slots for ever."""
    home = running("greedy", concurrency=2, max=1)
    home.demand("greedy", 1)
    home.demand("greedy", 5, waited_s=0.5)
    assert home.demand("patient", 1, waited_s=2.0).revokes == [("greedy", "i1", 0.0)]
    assert home.returned("greedy", "i1", 1).grants == [("patient", "i1", 1)]


def test_a_gateway_whose_sessions_wait_longer_gives_none_away() -> None:
    home = running("patient", concurrency=1, max=1)
    home.demand("patient", 1, waited_s=3.0)
    assert home.demand("greedy", 5, waited_s=1.0).revokes == []


def test_no_more_busy_gateways_are_asked_than_sessions_wait() -> None:
    home = HandledHome(concurrency=1, max=3)
    home.demand("greedy", 3)
    for instance in ("i1", "i2", "i3"):
        home.ready(instance)
    home.demand("greedy", 7, waited_s=0.1)
    assert len(home.demand("patient", 2, waited_s=1.0).revokes) == 2


# Idle


def test_what_nobody_holds_is_stopped_when_nothing_used_it_for_stop_after() -> None:
    home = running("g1", stop_after_s=30.0)
    home.returned("g1", "i1", 1, unused_s=10.0)
    assert home.wait(29.9).stops == {}
    assert home.wait(0.2).stops == {"i1": "idle for 30 s"}
    assert home.stopped("i1").releases == ["i1"]
    assert home.wait(REST_S - 1) == [] and home.activation.ledger(home.app.key) is not None
    assert home.wait(1) == [] and home.activation.ledger(home.app.key) is None
    assert home.activation.next_due() is None


def test_what_is_forgotten_at_rest_was_proven_and_is_not_while_something_is_in_the_way() -> None:
    home = HandledHome()
    home.demand("g1", 1)
    home.ready("i1")
    home.returned("g1", "i1", 1)
    home.wait(31)
    home.stopped("i1")
    home.wait(REST_S)
    home.activation.handle(AppChanged(home.app.key, home.app), home.now)
    assert home.ledger.proven == home.app.revision, "a burst starts as many as it did before"
    home.activation.forget(home.app.key)
    assert not home.activation._proven
    home.activation.handle(AppChanged(home.app.key, home.app), home.now)
    home.demand("g1", 1)
    (started,) = home.ledger.instances
    home.ended(started, "it exits")
    home.wait(10 * REST_S)
    assert home.activation.ledger(home.app.key) is not None, "its pauses go on"


def test_where_slots_are_held_the_gateways_are_asked_first() -> None:
    home = running("g1", "g2", stop_after_s=30.0)
    assert home.wait(30.0).revokes == [("g1", "i1", 30.0), ("g2", "i1", 30.0)]
    assert home.returned("g1", "i1", 1, unused_s=30.0) == []
    assert home.returned("g2", "i1", 1, unused_s=30.0).stops == {"i1": "idle for 30 s"}


def test_one_gateway_that_still_uses_it_keeps_it() -> None:
    home = running("g1", "g2", stop_after_s=30.0)
    home.wait(30.0)
    assert home.returned("g1", "i1", 1, unused_s=30.0) == []
    assert home.still_used("g2", "i1", unused_s=12.0) == []
    assert home.wait(17.9) == []
    assert home.wait(0.2).revokes == [("g2", "i1", 30.0)]


def test_a_gateway_that_has_not_answered_is_not_asked_again() -> None:
    home = running("g1", stop_after_s=1.0)
    assert len(home.wait(600).revokes) == 1


def test_a_long_session_is_asked_about_no_more_than_ten_times_a_second() -> None:
    home = HandledHome(stop_after_s=0.0)
    home.demand("g1", 1)
    home.ready("i1")
    asked = 0
    for _ in range(100):
        asked += len(home.wait(0.01).revokes)
        home.still_used("g1", "i1", unused_s=0.0)
    assert 5 <= asked <= 11


def test_a_session_that_comes_while_gateways_are_asked_gets_a_slot_and_keeps_it() -> None:
    home = running("g1", stop_after_s=30.0, concurrency=10)
    home.wait(30.0)
    assert home.demand("g2", 1).grants == [("g2", "i1", 1)]
    assert home.returned("g1", "i1", 1, unused_s=30.0).stops == {}
    assert home.wait(29.0).stops == {}


def test_a_session_that_comes_after_the_stop_gets_another_instance() -> None:
    home = running(stop_after_s=30.0, max=1)
    assert home.wait(31.0).stops == {"i1": "idle for 30 s"}
    assert home.demand("g1", 1).starts == ["i2"]
    assert home.stopped("i1").releases == ["i1"]
    assert home.ready("i2").grants == [("g1", "i2", 1)]


def test_the_longest_idle_stop_first_and_the_floor_stays() -> None:
    home = HandledHome(concurrency=1, max=3, stop_after_s=30.0)
    home.handle(floor(home, 1))
    home.demand("g1", 3)
    for instance in ("i1", "i2", "i3"):
        home.ready(instance)
    home.wait(10.0)
    for instance, unused_s in (("i1", 5.0), ("i2", 0.0), ("i3", 8.0)):
        home.returned("g1", instance, 1, unused_s=unused_s)
    assert list(home.wait(3600).stops) == ["i3", "i1"]


def test_one_that_never_got_a_session_idles_from_when_it_was_ready() -> None:
    home = HandledHome(stop_after_s=30.0)
    home.demand("g1", 1)
    home.demand("g1", 0)
    home.wait(5.0)
    home.ready("i1")
    assert home.wait(29.9).stops == {}
    assert list(home.wait(0.2).stops) == ["i1"]


def test_while_a_gateway_is_silent_nothing_counts_as_idle() -> None:
    home = running(stop_after_s=30.0)
    home.handle(GatewayJoined("g9"))
    assert home.wait(300) == []
    assert list(home.report("g9").stops) == ["i1"]


def test_what_a_gateway_held_is_free_when_it_is_gone() -> None:
    home = running("g1", concurrency=1, max=1)
    home.demand("g2", 1)
    assert home.handle(GatewayGone("g1")).grants == [("g2", "i1", 1)]


def test_what_waited_at_a_gateway_that_is_gone_starts_nothing() -> None:
    home = HandledHome(concurrency=1, max=3)
    home.demand("g1", 1)
    home.handle(GatewayGone("g1"))
    assert home.ready("i1").grants == []


# Floors, limits, age, people


def test_a_floor_is_started_without_sessions_and_kept() -> None:
    home = HandledHome(max=5, stop_after_s=1.0)
    assert home.handle(floor(home, 2)).starts == ["i1", "i2"]
    home.ready("i1")
    home.ready("i2")
    assert home.wait(3600) == []
    assert home.ended("i1").starts == ["i3"]


def test_a_lower_floor_lets_the_rest_idle_out() -> None:
    home = HandledHome(max=5, stop_after_s=30.0)
    home.handle(floor(home, 2))
    home.ready("i1")
    home.ready("i2")
    home.wait(100.0)
    assert len(home.handle(floor(home, 1)).stops) == 1


def test_a_floor_never_exceeds_max() -> None:
    home = HandledHome(max=2)
    assert len(home.handle(floor(home, 9)).starts) == 2


def test_a_floor_that_is_known_before_its_app_is_not_forgotten() -> None:
    home = HandledHome()
    home.restart()
    home.handle(floor(home, 1))
    assert home.handle(AppChanged(home.app.key, home.app)).starts == ["i1"]


def test_what_is_above_a_lowered_max_is_drained_the_least_used_first() -> None:
    home = HandledHome(concurrency=2, max=3)
    home.demand("g1", 5)
    for instance in ("i1", "i2", "i3"):
        home.ready(instance)
    assert home.deploy(max=2).revokes == [("g1", "i3", None)]
    assert list(home.returned("g1", "i3", 1).stops) == ["i3"]


def test_starts_above_a_lowered_max_are_stopped() -> None:
    home = HandledHome(concurrency=1, max=4)
    home.demand("g1", 4)
    assert list(home.deploy(max=2).stops) == ["i3", "i4"]


def test_an_instance_older_than_max_age_is_drained_even_when_busy() -> None:
    home = running("g1", max_age_s=100.0, stop_after_s=1000.0, concurrency=1)
    assert home.wait(99.0).revokes == []
    assert home.wait(2.0).revokes == [("g1", "i1", None)]
    assert home.demand("g2", 1).starts == ["i2"]
    assert home.returned("g1", "i1", 1).stops == {"i1": "older than its max_age of 100 s"}


def test_what_is_at_work_before_it_is_ready_is_not_idle_once_it_is() -> None:
    home = HandledHome(stop_after_s=0.0)
    assert home.demand("g1", 1).starts == ["i1"]
    home.hear("agent", StillUsed(home.app.key, InstanceId("i1"), -3.0))
    home.ready("i1")
    assert home.returned("g1", "i1", 1).stops == {}
    assert home.wait(2.9).stops == {}
    assert home.wait(0.2).stops == {"i1": "idle for 0 s"}


@pytest.mark.parametrize("drain_timeout_s", [30.0, 3600.0])
def test_a_drain_that_takes_too_long_cuts_the_sessions_left(drain_timeout_s: float) -> None:
    home = running("g1", stop_after_s=10_000.0, drain_timeout_s=drain_timeout_s)
    home.handle(StopAsked(home.app.key, InstanceId("i1")))
    assert home.wait(drain_timeout_s - 0.1).stops == {}
    assert home.wait(0.2).stops == {"i1": "stopped by request"}
    assert home.stopped("i1").releases == []
    assert home.returned("g1", "i1", 1).releases == ["i1"]


def test_a_person_may_stop_an_instance_that_is_idle_or_starting() -> None:
    home = running()
    assert home.handle(StopAsked(home.app.key, InstanceId("i1"))).stops == {
        "i1": "stopped by request"
    }
    assert home.handle(StopAsked(home.app.key, InstanceId("i1"))) == []
    home.demand("g1", 1)
    home.demand("g1", 0)
    assert list(home.handle(StopAsked(home.app.key, InstanceId("i2"))).stops) == ["i2"]
    assert home.handle(StopAsked(home.app.key, InstanceId("i7"))) == []
