"""Homes, nodes and gateways that go and come back; and when a home looks again."""

from tabane.gateway.activation import (
    AppChanged,
    GatewayGone,
    GatewayJoined,
    InstanceEnded,
    NodeReport,
    StopAsked,
)
from tabane.gateway.decisions import RECALL_S
from tabane.model import Instance, InstanceId, NodeName, State
from tabane.testing.home import NODE, Decided, HandledHome

I1 = InstanceId("i1")


def held(**reactive: object) -> HandledHome:
    """`i1` is ready, `g1` holds a slot of it."""
    home = HandledHome(**reactive)
    home.demand("g1", 1)
    home.ready("i1")
    return home


def recover(home: HandledHome, *gateways: str) -> None:
    """The home begins anew; these gateways are there."""
    home.restart()
    for gateway in gateways:
        home.handle(GatewayJoined(gateway))
    home.handle(AppChanged(home.app.key, home.app))


def answer(home: HandledHome, *instances: Instance) -> Decided:
    """Asked now, the node names these."""
    asked_at = home.now = home.now + 0.01
    return home.handle(NodeReport(NODE, instances, asked_at))


# Nodes that come back


def test_a_start_that_its_node_knows_nothing_of_is_made_again() -> None:
    home = HandledHome()
    home.demand("g1", 1)
    assert answer(home).starts == ["i2"]
    assert home.ledger.setbacks.count == 0


def test_a_start_that_was_on_its_way_when_its_node_answered_is_not_made_twice() -> None:
    home = HandledHome()
    asked_at = home.now
    home.wait(1)
    home.demand("g1", 1)
    home.wait(1)
    assert home.handle(NodeReport(NODE, (), asked_at)) == []


def test_a_stop_of_what_its_node_does_not_know_is_done() -> None:
    home = held(stop_after_s=1.0)
    home.returned("g1", "i1", 1)
    home.wait(0.5)
    asked_at = home.now
    assert list(home.wait(2).stops) == ["i1"]
    assert home.handle(NodeReport(NODE, (), asked_at)).releases == ["i1"]


def test_what_a_node_still_starts_is_waited_for() -> None:
    home = HandledHome()
    home.demand("g1", 1)
    assert answer(home, home.instance("i1", State.STARTING)) == []
    recover(home)
    answer(home, home.instance("i1", State.STARTING))
    assert home.demand("g1", 1).starts == []
    assert home.ready("i1").grants == [("g1", "i1", 1)]


def test_a_report_of_a_node_says_nothing_of_the_others() -> None:
    home = held()
    assert home.handle(NodeReport(NodeName("tokyo/tokyo-2"), (), home.now + 1.0)) == []


def test_all_that_a_node_reports_counts_before_anything_is_decided() -> None:
    home = HandledHome(concurrency=1, max=1)
    home.demand("g1", 1)
    decided = answer(home, home.instance("i7"), home.instance("i8", State.ABSENT))
    assert decided.starts == []
    assert decided.releases == ["i1", "i8"]
    assert decided.grants == [("g1", "i7", 1)]


def test_what_a_node_is_stopping_serves_no_one() -> None:
    home = HandledHome()
    recover(home)
    answer(home, home.instance("i1", State.STOPPING))
    assert len(home.demand("g1", 1).starts) == 1
    assert home.ledger.serving() == []


# A home that begins anew


def test_a_new_home_grants_nothing_of_what_it_found_until_all_gateways_reported() -> None:
    home = held(concurrency=2, max=1)
    recover(home, "g1", "g2")
    home.ready("i1")
    assert home.report("g1", waiting=2).grants == []
    assert home.report("g2", i1=1).grants == [("g1", "i1", 1)]


def test_a_new_home_waits_a_moment_for_reports_before_it_starts_more() -> None:
    home = held(concurrency=1, max=5)
    recover(home, "g1", "g2")
    home.ready("i1")
    assert home.report("g1", waiting=1).starts == []
    assert home.wait(RECALL_S - 0.01).starts == []
    assert len(home.wait(0.02).starts) == 1


def test_a_new_home_stops_nothing_until_all_gateways_reported() -> None:
    home = held(stop_after_s=1.0)
    recover(home, "g1", "g2")
    home.ready("i1")
    home.report("g1")
    home.handle(StopAsked(home.app.key, I1))
    assert home.wait(100).stops == {}
    assert home.report("g2").stops == {"i1": "stopped by request"}


def test_slots_of_an_instance_no_node_has_told_of_are_counted() -> None:
    home = held(concurrency=2, max=1)
    recover(home, "g1")
    home.report("g1", i1=2)
    home.demand("g2", 1)
    assert home.wait(1).starts == []
    home.ready("i1")
    assert home.ledger.instances[I1].granted == {"g1": 2}
    assert home.wait(1).starts == []
    assert home.returned("g1", "i1", 1).grants == [("g2", "i1", 1)]


def test_an_instance_no_node_ever_tells_of_is_forgotten_with_its_slots() -> None:
    home = HandledHome(stop_after_s=30.0, max=1)
    recover(home, "g1")
    home.report("g1", i1=1)
    assert home.wait(31).revokes == [("g1", "i1", 30.0)]
    assert home.returned("g1", "i1", 1, unused_s=31.0) == []
    assert home.ledger.instances == {}


def test_slots_of_an_app_that_is_gone_are_revoked() -> None:
    home = HandledHome()
    home.restart()
    home.handle(AppChanged(home.app.key, None))
    assert home.report("g1", i1=1).revokes == [("g1", "i1", None)]
    assert home.ready("i1").stops == {}
    assert list(home.returned("g1", "i1", 1).stops) == ["i1"]


def test_an_old_revision_that_a_new_home_found_gets_no_more_sessions() -> None:
    """Its port and concurrency are not known here; what its gateways hold goes on."""
    home = held(concurrency=5, stop_after_s=1000.0)
    home.redeploy(port=9000)
    recover(home, "g1")
    home.report("g1", i1=1)
    assert len(home.ready("i1", revision=1).starts) == 1
    assert home.demand("g1", 1).grants == []
    (trial,) = home.ledger.starting()
    assert home.ready(trial.id).grants == [("g1", trial.id, 1)]


def test_an_end_that_only_a_new_home_hears_of_releases() -> None:
    home = HandledHome()
    recover(home)
    event = InstanceEnded(home.app.key, InstanceId("i9"), NODE, "stopped", failed=True)
    assert home.handle(event).releases == ["i9"]


def test_an_app_whose_home_moved_is_forgotten() -> None:
    home = held(stop_after_s=1.0)
    home.activation.forget(home.app.key)
    assert home.activation.apps() == ()
    assert home.wait(100) == []


# Gateways that break and come back


def test_a_report_takes_the_place_of_all_that_was_known_of_a_gateway() -> None:
    home = held(concurrency=5, max=1, stop_after_s=1000.0)
    home.demand("g1", 3)
    decided = home.report("g1", waiting=2, i1=1)
    assert decided.grants == [("g1", "i1", 2)]
    assert home.ledger.instances[I1].granted == {"g1": 3}


def test_a_gateway_that_restarted_frees_what_it_held() -> None:
    home = held(concurrency=1, max=1)
    home.demand("g2", 1)
    assert home.report("g1").grants == [("g2", "i1", 1)]


def test_a_new_epoch_counts_answers_from_where_the_gateway_stands() -> None:
    """Answers of a home before this one must not look like sessions to come."""
    home = HandledHome(concurrency=1, max=99)
    assert len(home.demand("g1", 2, seen=50).starts) == 2
    home.epoch += 1
    assert len(home.demand("g1", 5, seen=0).starts) == 3


def test_a_gateway_that_reports_what_drains_is_told_again() -> None:
    home = held(stop_after_s=1000.0)
    home.handle(StopAsked(home.app.key, I1))
    assert home.report("g1", i1=1).revokes == [("g1", "i1", None)]
    assert list(home.returned("g1", "i1", 1).stops) == ["i1"]


def test_a_gateway_that_is_gone_holds_up_nothing() -> None:
    home = held(stop_after_s=1.0)
    home.handle(GatewayJoined("g2"))
    assert home.handle(GatewayGone("g1")).stops == {}
    home.wait(5)
    assert list(home.handle(GatewayGone("g2")).stops) == ["i1"]


# Time


def test_a_late_look_does_all_that_was_due_and_plans_the_next() -> None:
    home = held(stop_after_s=1.0, max_age_s=50.0)
    home.returned("g1", "i1", 1)
    home.now += 500.0
    assert list(home.demand("g2", 0).stops) == ["i1"]
    due = home.activation.next_due()
    assert due is None or due > home.now


def test_timers_do_not_pile_up() -> None:
    home = held(concurrency=1, max=1, stop_after_s=3600.0, max_age_s=7200.0)
    holder, other = "g1", "g2"
    for _ in range(500):
        assert home.demand(other, 1).revokes == [(holder, "i1", 0.0)]
        home.wait(RECALL_S / 2)
        assert home.returned(holder, "i1", 1).grants == [(other, "i1", 1)]
        home.wait(RECALL_S)
        holder, other = other, holder
    assert len(home.activation._timers) < 100


def test_an_idle_home_looks_rarely() -> None:
    home = held(stop_after_s=10.0)
    looks = 0
    while home.now < 2_000.0 and (due := home.activation.next_due()) is not None:
        looks += 1
        home.wait(due - home.now)
        home.still_used("g1", "i1")
    assert looks <= 220
