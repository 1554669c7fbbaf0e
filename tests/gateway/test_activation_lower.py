"""Instances that their node, short of memory, wants lower on the ladder: a session wins."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tabane.gateway.activation import FloorChanged, GatewayJoined, InstanceAwake, LowerAsked
from tabane.gateway.decisions import SHORT_AGAIN_S
from tabane.gateway.instructions import Freeze
from tabane.gateway.lowering import LOWER_IDLE_S, LOWER_S
from tabane.model import InstanceId
from tabane.scheduler.pressure import Rung
from tabane.testing.home import NODE, Decided, HandledHome

I1, I2 = InstanceId("i1"), InstanceId("i2")
WHY = "its node is short of memory"
RUNGS = pytest.mark.parametrize("rung", Rung)


def idle(**reactive: object) -> HandledHome:
    """`i1` is ready, and `g1` still holds a slot of it, which no session uses."""
    home = HandledHome(**{"stop_after_s": 100.0, **reactive})
    home.demand("g1", 1)
    home.ready("i1")
    home.wait(5.0)
    return home


def lower(
    home: HandledHome, rung: Rung = Rung.LEAVE, one: InstanceId = I1, *, last: bool = False
) -> Decided:
    return home.handle(LowerAsked(home.app.key, one, rung, WHY, last))


def lowered(decided: Decided) -> dict[InstanceId, str]:
    """With the reasons of stops and freezes alike."""
    frozen = {one.instance: one.reason for one in decided if isinstance(one, Freeze)}
    return frozen | decided.stops


@RUNGS
def test_who_holds_slots_gives_them_back_first(rung: Rung) -> None:
    home = idle()
    decided = lower(home, rung)
    assert (decided.revokes, lowered(decided)) == ([("g1", "i1", LOWER_IDLE_S)], {})
    assert lowered(home.returned("g1", "i1", 1, unused_s=4.0)) == {I1: WHY}


@RUNGS
def test_what_nobody_holds_goes_at_once(rung: Rung) -> None:
    home = idle()
    home.returned("g1", "i1", 1, unused_s=1.0)
    decided = lower(home, rung)
    assert lowered(decided) == {I1: WHY}
    assert bool(decided.stops) == (rung is Rung.LEAVE)


@RUNGS
def test_what_a_session_is_in_stays(rung: Rung) -> None:
    home = idle()
    lower(home, rung)
    assert home.still_used("g1", "i1") == []
    assert lowered(home.wait(10 * LOWER_S)) == {}


@RUNGS
def test_a_session_that_comes_meanwhile_wins(rung: Rung) -> None:
    """`g1` gives its slot back, and asks for one in the same breath."""
    home = idle(concurrency=1)
    lower(home, rung)
    home.demand("g2", 1)
    decided = home.returned("g1", "i1", 1)
    assert decided.grants == [("g2", "i1", 1)]
    home.still_used("g2", "i1")
    assert lowered(home.wait(10 * LOWER_S)) == {}


def test_one_that_was_told_to_freeze_is_thawed_by_a_session() -> None:
    home = idle()
    home.returned("g1", "i1", 1, unused_s=1.0)
    lower(home, Rung.REST)
    assert home.demand("g1", 1).thaws == [I1]


def test_a_gateway_that_does_not_answer_saves_it() -> None:
    home = idle()
    lower(home)
    home.wait(LOWER_S)
    assert lowered(home.returned("g1", "i1", 1, unused_s=4.0)) == {}


def test_until_all_gateways_have_reported_nothing_goes() -> None:
    home = idle()
    home.returned("g1", "i1", 1, unused_s=1.0)
    home.handle(GatewayJoined("g9"))
    assert lowered(lower(home)) == {}
    assert lowered(home.report("g9")) == {I1: WHY}


def test_what_min_keeps_is_frozen_but_stopped_only_when_nothing_else_helps() -> None:
    home = idle()
    home.handle(FloorChanged(home.app.key, 1))
    home.returned("g1", "i1", 1, unused_s=1.0)
    assert lowered(lower(home)) == {}
    assert lower(home, Rung.REST).freezes == [I1]
    assert lower(home, last=True).stops == {I1: WHY}


def test_of_an_app_with_a_min_what_is_more_may_go() -> None:
    home = idle(concurrency=1)
    home.handle(FloorChanged(home.app.key, 1))
    home.demand("g2", 1)
    home.wait(0.2)
    home.ready("i2")
    home.returned("g1", "i1", 1, unused_s=3.0)
    home.returned("g2", "i2", 1, unused_s=1.0)
    assert lowered(lower(home, one=I2)) == {}
    assert lower(home, one=I1).stops == {I1: WHY}


def test_an_engine_that_cannot_freeze_leaves_it_running() -> None:
    home = idle()
    home.ledger.instances[I1].instance = replace(home.instance("i1"), freezable=False)
    home.returned("g1", "i1", 1, unused_s=1.0)
    assert lowered(lower(home, Rung.REST)) == {}
    assert lower(home).stops == {I1: WHY}


def test_what_a_person_uses_stays() -> None:
    home = idle()
    home.returned("g1", "i1", 1, unused_s=1.0)
    lower(home, Rung.REST)
    home.handle(InstanceAwake(home.app.key, I1, 1))
    assert lowered(home.wait(10.0)) == {}


def test_of_what_is_gone_or_never_was_nothing_is_asked() -> None:
    home = idle()
    assert lower(home, one=InstanceId("i9")) == []
    home.returned("g1", "i1", 1, unused_s=1.0)
    lower(home)
    assert lower(home) == []
    home.stopped("i1")
    assert lower(home) == []


def test_what_min_keeps_is_tried_again_when_no_node_had_room_for_it() -> None:
    home = HandledHome()
    home.node = None
    home.handle(FloorChanged(home.app.key, 1))
    assert home.wait(60.0).starts == []
    home.node = NODE
    assert home.wait(SHORT_AGAIN_S).starts == ["i1"]
