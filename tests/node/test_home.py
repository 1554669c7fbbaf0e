"""A home whose gateways come and go, in virtual time: what they may hold is not given away."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tabane.gateway.activation import AppChanged, InstanceEnded, InstanceReady
from tabane.gateway.decisions import CROWDED_AGAIN_S, CROWDED_S
from tabane.gateway.messages import AppReport, Demand, Grant, Held, Refuse, Report, ToGateway
from tabane.model import (
    App,
    Class,
    Generation,
    Instance,
    InstanceId,
    NodeName,
    Reactive,
    State,
)
from tabane.node.home import Home
from tabane.node.membership import GATEWAY_GRACE_S
from tabane.scheduler.engines import EngineView
from tabane.scheduler.placement import NodeView
from tabane.testing.clock import VirtualClock

NODE = NodeName("tokyo/tokyo-1")
APP = App(
    name="hello",
    image="host",
    port=8000,
    revision=1,
    reactive=Reactive(concurrency=1, max=1, stop_after_s=1.0),
)
FOUND = Instance(
    id=InstanceId("found"),
    app=APP.key,
    revision=1,
    node=NODE,
    generation=Generation("incarnation", InstanceId("found"), 1),
    state=State.READY,
    address="10.0.0.1",
)


class Rig:
    """A home that has just begun, and what it tells the others to do."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.started: list[InstanceId] = []
        self.stopped: list[InstanceId] = []
        self.frozen: list[InstanceId] = []
        self.thawed: list[InstanceId] = []
        self.told: list[tuple[str, ToGateway]] = []
        self.view = NodeView(NODE, (EngineView("runc", Class.CONTAINER),))
        self.others = False
        self.apps = {APP.key: APP}
        self.revision = 7
        self.home = Home(
            self,
            self.clock,
            app_of=lambda key: self.apps.get(key),
            nodes=lambda: [self.view],
            revision=lambda: self.revision,
            may_go_elsewhere=lambda app: self.others,
        )

    def start_instance(
        self, node: NodeName, app: App, instance: InstanceId, *, resume: bool = False
    ) -> None:
        self.started.append(instance)

    def freeze_instance(
        self, node: NodeName, instance: InstanceId, number: int, reason: str = ""
    ) -> None:
        self.frozen.append(instance)

    def thaw_instance(self, node: NodeName, instance: InstanceId) -> None:
        self.thawed.append(instance)

    def stop_instance(self, node: NodeName, instance: InstanceId, reason: str) -> None:
        self.stopped.append(instance)

    def release_instance(self, node: NodeName, instance: InstanceId) -> None:
        pass

    def tell_gateway(self, gateway: str, message: ToGateway) -> None:
        self.told.append((gateway, message))

    def granted_to(self, gateway: str) -> int:
        return sum(m.slots for g, m in self.told if g == gateway and isinstance(m, Grant))

    def joins(self, gateway: str, *, waiting: int = 0, held: int = 0) -> None:
        """It comes, and reports."""
        self.home.on_gateway(gateway, joined=True)
        slots = (Held(FOUND.id, held, 0.0),) if held else ()
        reports = (AppReport(Demand(APP.key, waiting, 0.0, 1, 0), slots),)
        self.home.hear(gateway, Report(reports if waiting or held else ()))

    def find(self) -> None:
        self.home.about(APP.key, InstanceReady(FOUND))

    def refusals(self) -> list[str]:
        return [message.kind for _, message in self.told if isinstance(message, Refuse)]

    def learn(self, revision: int, *apps: App) -> None:
        """The store reaches this node."""
        self.revision, self.apps = revision, {app.key: app for app in apps}
        for app in apps:
            if self.home.ledger(app.key) is not None:
                self.home.handle(AppChanged(app.key, app))
        self.home.on_store()


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_what_an_absent_gateway_may_use_is_not_stopped_by_a_new_home(rig: Rig) -> None:
    rig.home.expect(["g2"])
    rig.joins("g1")
    rig.find()
    rig.clock.advance(GATEWAY_GRACE_S - 0.1)
    assert rig.stopped == []
    rig.clock.advance(0.2)
    assert rig.stopped == ["found"]


def test_what_an_absent_gateway_may_hold_is_not_granted_by_a_new_home(rig: Rig) -> None:
    rig.home.expect(["g2"])
    rig.find()
    rig.joins("g1", waiting=1)
    rig.clock.advance(GATEWAY_GRACE_S - 0.1)
    assert rig.granted_to("g1") == 0
    rig.clock.advance(0.2)
    assert rig.granted_to("g1") == 1


def test_an_absent_gateway_that_comes_has_what_it_held(rig: Rig) -> None:
    rig.home.expect(["g2"])
    rig.joins("g1")
    rig.find()
    rig.clock.advance(GATEWAY_GRACE_S / 2)
    rig.joins("g2", held=1)
    rig.home.hear("g1", Demand(APP.key, 1, 0.0, 1, 0))
    rig.clock.advance(GATEWAY_GRACE_S)
    assert rig.granted_to("g1") == 0
    assert rig.stopped == []


def test_sessions_wait_for_a_home_that_has_not_heard_of_the_app(rig: Rig) -> None:
    rig.apps.clear()
    rig.joins("g1")
    rig.home.hear("g1", Demand(APP.key, 1, 0.0, 1, 0, known=9))
    rig.find()
    assert (rig.refusals(), rig.stopped, rig.started) == ([], [], [])
    rig.learn(8)
    assert rig.refusals() == []
    rig.learn(9, APP)
    assert rig.granted_to("g1") == 1
    assert (rig.refusals(), rig.stopped, rig.started) == ([], [], [])


def test_those_of_an_app_that_is_gone_are_told_so_once_that_is_sure(rig: Rig) -> None:
    rig.apps.clear()
    rig.joins("g1")
    rig.home.hear("g1", Demand(APP.key, 1, 0.0, 1, 0, known=9))
    rig.learn(9)
    assert rig.refusals() == ["gone"]
    assert rig.home.ledger(APP.key) is None
    rig.home.hear("g1", Demand(APP.key, 1, 0.0, 1, 1, known=9))
    assert rig.refusals() == ["gone", "gone"]


def test_an_app_that_was_removed_may_have_come_again(rig: Rig) -> None:
    rig.joins("g1")
    rig.find()
    rig.home.hear("g1", Demand(APP.key, 1, 0.0, 1, 0, known=7))
    rig.apps.clear()
    rig.home.handle(AppChanged(APP.key, None))
    rig.home.hear("g1", Demand(APP.key, 1, 0.0, 1, 1, known=9))
    assert rig.refusals() == []
    rig.learn(9, APP)
    assert rig.home.ledger(APP.key).app == APP  # type: ignore[union-attr]
    assert rig.refusals() == []


def test_no_start_waits_for_an_absent_gateway(rig: Rig) -> None:
    rig.home.expect(["g2"])
    rig.joins("g1", waiting=1)
    assert len(rig.started) == 1


def test_a_home_that_takes_an_app_over_asks_after_a_gateway_that_is_just_away(rig: Rig) -> None:
    """What the home before this one granted it is not known here."""
    rig.joins("g1")
    rig.joins("g2")
    rig.home.on_gateway("g2", joined=False)
    rig.find()
    rig.clock.advance(GATEWAY_GRACE_S - 0.1)
    assert rig.stopped == []
    rig.joins("g2", held=1)
    rig.clock.advance(GATEWAY_GRACE_S)
    assert rig.stopped == []


def test_a_gateway_that_stays_away_loses_its_slots_after_its_grace(rig: Rig) -> None:
    rig.joins("g1")
    rig.find()
    rig.joins("g2", held=1)
    rig.home.on_gateway("g2", joined=False)
    rig.home.hear("g1", Demand(APP.key, 1, 0.0, 1, 0))
    rig.clock.advance(GATEWAY_GRACE_S - 0.1)
    assert rig.granted_to("g1") == 0
    rig.clock.advance(0.2)
    assert rig.granted_to("g1") == 1


def test_a_report_that_overtakes_the_news_of_its_gateway_counts(rig: Rig) -> None:
    rig.home.hear("g1", Report(()))
    rig.home.on_gateway("g1", joined=True)
    rig.find()
    rig.clock.advance(2.0)
    assert rig.stopped == ["found"]


@pytest.mark.parametrize("others", [False, True])
def test_memory_is_waited_for_only_where_no_other_data_center_may_run_it(
    rig: Rig, others: bool
) -> None:
    rig.view = replace(rig.view, memory_available_bytes=0)
    rig.others = others
    rig.joins("g1", waiting=1)
    assert rig.refusals() == (["elsewhere"] if others else [])
    rig.clock.advance(CROWDED_S + CROWDED_AGAIN_S)
    assert rig.refusals() == ["elsewhere"]


def test_a_node_that_declined_is_shown_with_its_reason_and_asked_again_later(rig: Rig) -> None:
    rig.joins("g1", waiting=1)
    (first,) = rig.started
    told = "9 starts wait on it already", False, True, 1.0
    rig.home.handle(InstanceEnded(APP.key, first, NODE, *told))
    assert rig.refusals() == ["elsewhere"]
    assert rig.home.explain(APP).node is None
    assert rig.home.explain(APP).reasons == (f"{NODE}: 9 starts wait on it already",)
    rig.joins("g2", waiting=1)
    assert rig.started == [first]
    rig.clock.advance(1.0)
    assert rig.home.explain(APP).node == NODE
    rig.joins("g3", waiting=1)
    assert len(rig.started) == 2


def test_a_closed_home_does_nothing_more(rig: Rig) -> None:
    rig.joins("g1")
    rig.find()
    rig.home.on_gateway("g1", joined=False)
    rig.home.close()
    rig.clock.advance(100.0)
    assert rig.stopped == []
