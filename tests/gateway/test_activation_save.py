"""When an app's home has an instance saved, and what becomes of sessions meanwhile."""

from __future__ import annotations

from msgspec.structs import replace

from tabane.gateway.activation import InstanceAwake, InstanceReady, NodeReport, Save
from tabane.gateway.decisions import SAVE_IDLE_S
from tabane.gateway.messages import SAVED, Grant
from tabane.model import InstanceId, State
from tabane.testing.home import NODE, Decided, HandledHome

I1, I2 = InstanceId("i1"), InstanceId("i2")


def saves(decided: Decided) -> list[tuple[InstanceId, int]]:
    return [(one.instance, one.number) for one in decided if isinstance(one, Save)]


def ready(home: HandledHome, name: str) -> Decided:
    """One that its node wants a checkpoint of."""
    return home.handle(InstanceReady(replace(home.instance(name), savable=True)))


def rested(**reactive: object) -> HandledHome:
    home = HandledHome(stop_after_s=10.0, **reactive)
    home.demand("g1", 1)
    ready(home, "i1")
    home.returned("g1", "i1", 1)
    return home


def saving(**reactive: object) -> HandledHome:
    home = rested(**reactive)
    assert saves(home.wait(SAVE_IDLE_S)) == [(I1, 1)]
    return home


def awake(home: HandledHome, number: int, again_s: float | None = None) -> Decided:
    return home.handle(InstanceAwake(home.app.key, I1, number, used=False, again_s=again_s))


def test_it_is_saved_once_when_no_session_used_it_for_a_moment() -> None:
    home = rested()
    assert saves(home.wait(SAVE_IDLE_S - 0.01)) == []
    assert saves(home.wait(0.01)) == [(I1, 1)]
    awake(home, 1)
    assert saves(home.wait(9.0)) == []


def test_who_holds_slots_is_asked_for_them_first() -> None:
    home = HandledHome(stop_after_s=10.0)
    home.demand("g1", 1)
    ready(home, "i1")
    decided = home.wait(SAVE_IDLE_S)
    assert (decided.revokes, saves(decided)) == ([("g1", "i1", SAVE_IDLE_S)], [])
    assert saves(home.still_used("g1", "i1", 0.1)) == []
    home.wait(0.11)
    assert saves(home.returned("g1", "i1", 1, SAVE_IDLE_S)) == [(I1, 1)]


def test_without_a_wish_of_its_node_nothing_is_saved() -> None:
    home = HandledHome(stop_after_s=10.0)
    home.demand("g1", 1)
    home.ready("i1")
    home.returned("g1", "i1", 1)
    assert saves(home.wait(5.0)) == []


def test_it_is_saved_before_it_is_frozen_or_stopped_however_soon_that_is() -> None:
    home = rested(freeze_after_s=0.05)
    decided = home.wait(0.06)
    assert (saves(decided), decided.freezes) == ([(I1, 1)], [])
    assert home.wait(1.0).freezes == []
    assert awake(home, 1).freezes == [I1]
    assert rested(freeze_after_s=0.0).ledger.instances[I1].is_saving
    home = HandledHome(stop_after_s=0.05)
    home.demand("g1", 1)
    ready(home, "i1")
    home.returned("g1", "i1", 1)
    decided = home.wait(1.0)
    assert (saves(decided), decided.stops) == ([(I1, 1)], {})
    assert awake(home, 1).stops == {I1: "idle for 0.05 s"}


def test_a_session_is_granted_a_slot_of_it_at_once_and_its_record_says_why_it_waits() -> None:
    home = saving()
    decided = home.demand("g1", 1)
    assert decided.thaws == [I1]
    ((_, grant),) = decided.told(Grant)
    assert grant.trace == SAVED
    assert awake(home, 1) == []
    home.returned("g1", "i1", 1)
    assert saves(home.wait(5.0)) == []


def test_of_one_revision_on_a_node_one_is_saved() -> None:
    home = HandledHome(stop_after_s=10.0, concurrency=1)
    home.demand("g1", 2)
    ready(home, "i1")
    ready(home, "i2")
    home.returned("g1", "i1", 1)
    home.returned("g1", "i2", 1)
    decided = home.wait(SAVE_IDLE_S)
    assert len(saves(decided)) == 1
    awake(home, 1)
    assert saves(home.wait(5.0)) == []


def test_what_could_not_be_saved_is_tried_again_when_its_node_says() -> None:
    home = saving()
    awake(home, 1, again_s=2.0)
    assert saves(home.wait(1.9)) == []
    assert saves(home.wait(0.2)) == [(I1, 2)]


def test_the_time_for_stop_after_goes_on_while_it_is_saved() -> None:
    home = saving()
    home.wait(0.5)
    awake(home, 1)
    assert home.wait(10.0 - SAVE_IDLE_S - 0.5 - 0.1) == []
    assert home.wait(0.2).stops == {I1: "idle for 10 s"}


def test_a_word_that_was_lost_is_made_good_by_what_the_node_reports() -> None:
    home = saving()
    home.wait(1.0)
    found = replace(home.instance("i1"), freezes=1)
    home.handle(NodeReport(NODE, (found,), home.now))
    assert home.ledger.instances[I1].state is State.READY
    assert not home.ledger.instances[I1].is_saving


def test_a_new_home_learns_that_it_is_being_saved() -> None:
    home = saving()
    home.restart()
    home.deploy(stop_after_s=0.1)
    found = replace(home.instance("i1"), state=State.CHECKPOINTING, freezes=1, savable=True)
    home.handle(NodeReport(NODE, (found,), home.now))
    assert home.wait(1.0) == []
    assert saves(awake(home, 1)) == [(I1, 2)]


def test_an_old_revision_is_not_saved() -> None:
    home = rested()
    home.app = replace(home.app, revision=2)
    home.deploy(stop_after_s=10.0)
    assert saves(home.wait(1.0)) == []
