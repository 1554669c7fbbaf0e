"""Starts that nodes do not take on, and a thundering herd on an app that is broken."""

from __future__ import annotations

import pytest

from tabane.gateway.decisions import PATIENCE_S, UNPROVEN_AT_ONCE
from tabane.gateway.messages import Refuse
from tabane.model import App, AppName, Reactive
from tabane.testing.home import HandledHome
from tabane.testing.wakes import Session, VirtualDatacenter
from tabane.testing.world import World

HERD, OTHER = AppName("default/herd"), AppName("default/other")


# What a node does not take on


def test_who_waits_for_a_start_that_its_node_declines_is_told_at_once() -> None:
    home = HandledHome()
    home.demand("g1", 3)
    ((gateway, refuse),) = home.declined("i1", "200 starts wait").told(Refuse)
    assert (gateway, refuse.kind, refuse.sessions) == ("g1", "elsewhere", 3)
    assert "no node of this data center can run default/hello now" in refuse.reason
    assert "(n1: 200 starts wait)" in refuse.reason
    assert home.ledger.setbacks.count == 0, "that says nothing of the app"


def test_a_node_that_declined_is_not_asked_again_for_a_while() -> None:
    home = HandledHome()
    home.demand("g1", 1)
    home.declined("i1", again_s=1.0)
    home.wait(0.5)
    decided = home.demand("g1", 2)
    assert (decided.starts, decided.refusals) == ([], [("g1", "elsewhere", 2)])
    home.wait(0.6)
    assert home.demand("g1", 1).starts == ["i2"]


def test_who_may_get_a_slot_of_what_is_there_waits_and_more_are_asked_for_later() -> None:
    home = HandledHome(concurrency=1, max=3)
    assert home.demand("g1", 2).starts == ["i1", "i2"]
    assert home.declined("i2", again_s=1.0).refusals == []
    home.ready("i1")
    assert home.wait(0.9).starts == []
    assert home.wait(0.2).starts == ["i3"]
    assert home.ready("i3").grants == [("g1", "i3", 1)]


def test_what_is_kept_without_sessions_is_asked_for_again_too() -> None:
    from tabane.gateway.activation import FloorChanged

    home = HandledHome()
    assert home.handle(FloorChanged(home.app.key, 1)).starts == ["i1"]
    home.declined("i1", again_s=2.0)
    assert home.wait(1.9).starts == []
    assert home.wait(0.2).starts == ["i2"]


# A herd


def herd(*, start_takes: float, fails: bool = True) -> VirtualDatacenter:
    """Two apps on two nodes; of `herd` no start succeeds."""
    dc = VirtualDatacenter(World(1), queue=2_000)
    dc.add(nodes=2, gateways=2)
    dc.start_takes = lambda app: start_takes if app.key == HERD else 0.1
    dc.fails = lambda app: fails and app.key == HERD
    limits = Reactive(concurrency=1, max=100, start_timeout_s=10.0)
    for name in ("herd", "other"):
        dc.store(App(name, "host", port=80, revision=1, reactive=limits))
    return dc


def send(dc: VirtualDatacenter, app: AppName, count: int) -> list[Session]:
    sessions = [Session(app, takes_s=0.01, patience_s=11.0) for _ in range(count)]
    gateways = list(dc.gateways.values())
    for number, session in enumerate(sessions):
        gateways[number % len(gateways)].arrive(session)
    return sessions


def starts_of(dc: VirtualDatacenter, app: AppName) -> int:
    return sum(start.app.key == app for start in dc.home.started)


@pytest.mark.parametrize("start_takes", [0.02, 3.0])
def test_a_thousand_requests_at_a_broken_app_are_few_starts_and_quick_refusals(
    start_takes: float,
) -> None:
    dc = herd(start_takes=start_takes)
    sessions = send(dc, HERD, 1_000)
    dc.world.run(2 * start_takes + 1.0)
    assert {session.outcome for session in sessions} == {"refused"}
    assert {"exited with code 1" in session.reason for session in sessions} == {True}
    assert starts_of(dc, HERD) <= UNPROVEN_AT_ONCE + 1
    assert not dc.problems


def test_a_herd_that_comes_again_and_again_is_one_start_each_pause_and_the_pauses_grow() -> None:
    """For two minutes a hundred each half second; what is refused comes again with the others."""
    dc = herd(start_takes=0.02)
    sessions = []
    for _ in range(240):
        sessions += send(dc, HERD, 100)
        dc.world.run(0.5)
    dc.world.run(2 * PATIENCE_S)
    assert {session.outcome for session in sessions} == {"refused"}
    assert starts_of(dc, HERD) <= UNPROVEN_AT_ONCE + 10
    assert not dc.problems


def test_in_a_long_pause_nobody_waits() -> None:
    dc = herd(start_takes=0.02)
    for _ in range(20):
        send(dc, HERD, 10)
        dc.world.run(0.5)
    began, sessions = starts_of(dc, HERD), send(dc, HERD, 1_000)
    dc.world.run(0.1)
    assert {session.outcome for session in sessions} == {"refused"}
    assert all("did not start" in session.reason for session in sessions)
    assert starts_of(dc, HERD) == began


def test_a_herd_does_not_keep_others_from_waking() -> None:
    dc = herd(start_takes=0.02)
    send(dc, HERD, 1_000)
    others = send(dc, OTHER, 3)
    dc.world.run(0.5)
    assert {session.outcome for session in others} == {"served"}


def test_an_app_that_is_well_again_serves_its_herd() -> None:
    dc = herd(start_takes=0.02)
    send(dc, HERD, 1_000)
    dc.world.run(5.0)
    dc.fails = lambda app: False
    dc.world.run(30.0)
    sessions = send(dc, HERD, 1_000)
    dc.world.run(10.0)
    assert {session.outcome for session in sessions} == {"served"}
