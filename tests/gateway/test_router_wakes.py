"""What the router records of sessions that had to wait, also when nothing came of it."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from tabane.errors import TimedOut, Unavailable
from tabane.gateway import router as module
from tabane.gateway.messages import Demand, Grant, Refuse, ToHome
from tabane.gateway.router import GatewayRouter
from tabane.model import (
    App,
    AppName,
    Generation,
    InstanceId,
    NodeName,
    Placement,
    Reactive,
    WakeRecord,
)
from tabane.testing import VirtualClock

KEY = AppName("default/hello")
NODE = NodeName("tokyo/tokyo-1")


class Around:
    """A node whose home says nothing by itself."""

    node, datacenter, name, token = NODE, "tokyo", "tokyo/tokyo-1/gateway-0", "t"

    def __init__(self) -> None:
        self.records: list[WakeRecord] = []
        self.asked: asyncio.Queue[ToHome] = asyncio.Queue()

    def tell_home(self, app: AppName, message: ToHome) -> None:
        self.asked.put_nowait(message)

    def gateway_of(self, node: NodeName) -> tuple[str, int]:
        return ("", 0)

    def live_nodes(self) -> list[NodeName]:
        return [NODE]

    def on_wake(self, record: WakeRecord) -> None:
        self.records.append(record)

    def kick(self) -> None:
        pass


@pytest.fixture
def around() -> Around:
    return Around()


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def router(around: Around, clock: VirtualClock) -> GatewayRouter:
    router = GatewayRouter(around, clock)
    reactive = Reactive(start_timeout_s=3600)
    router.set_routes([App("hello", "host", port=80, hosts=("h.test",), reactive=reactive)], [])
    return router


async def demand(around: Around) -> Demand:
    message = await around.asked.get()
    assert isinstance(message, Demand)
    return message


def answered(message: Demand) -> dict[str, int]:
    return {"epoch": message.epoch, "answered": message.answered_seen + 1}


async def refused(
    router: GatewayRouter, around: Around, clock: VirtualClock, kind: str = "broken"
) -> None:
    route = router.route("h.test", "/")
    assert route is not None
    waiting = asyncio.ensure_future(router.acquire(route))
    asked = await demand(around)
    clock.advance(0.5)
    router.hear(Refuse(KEY, kind, "did not start once: it exits", 1.0, 1, **answered(asked)))
    with pytest.raises(Unavailable, match="default/hello did not start once: it exits"):
        await waiting


async def test_a_start_that_fails_has_one_record(
    router: GatewayRouter, around: Around, clock: VirtualClock
) -> None:
    await refused(router, around, clock)
    (record,) = around.records
    assert (record.app, record.option, record.outcome) == (
        KEY,
        "failed",
        "did not start once: it exits",
    )
    assert (record.instance, record.node, record.total_us) == ("", "", 500_000)
    assert record.phases_us["queue"] == 500_000
    await refused(router, around, clock)
    assert len(around.records) == 1, "of the same wake"
    clock.advance(1.0)
    await refused(router, around, clock)
    assert len(around.records) == 2


async def test_who_is_refused_while_nothing_is_started_woke_nothing(
    router: GatewayRouter, around: Around, clock: VirtualClock
) -> None:
    await refused(router, around, clock, kind="paused")
    assert around.records == []


async def test_who_can_wait_for_the_next_start_waits_on(
    router: GatewayRouter, around: Around, clock: VirtualClock
) -> None:
    route = router.route("h.test", "/")
    assert route is not None
    first = asyncio.ensure_future(router.acquire(route))
    await demand(around)
    clock.advance(5.0)
    second = asyncio.ensure_future(router.acquire(route))
    asked = await demand(around)
    answers = {"epoch": asked.epoch, "answered": asked.answered_seen + 2}
    router.hear(
        Refuse(KEY, "paused", "did not start twice: it exits", 9.0, 2, **answers, waited_s=3)
    )
    with pytest.raises(Unavailable):
        await first
    again = await demand(around)
    assert (again.waiting, again.waited_s, second.done()) == (1, 0.0, False)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second


async def test_a_client_that_leaves(router: GatewayRouter, around: Around) -> None:
    route = router.route("h.test", "/")
    assert route is not None
    waiting = asyncio.ensure_future(router.acquire(route))
    await demand(around)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert [record.outcome for record in around.records] == ["its client left"]


async def test_a_client_that_leaves_does_not_hide_why_others_are_refused(
    router: GatewayRouter, around: Around
) -> None:
    route = router.route("h.test", "/")
    assert route is not None
    left, waits = (asyncio.ensure_future(router.acquire(route)) for _ in range(2))
    await demand(around)
    left.cancel()
    message = await demand(around)
    router.hear(Refuse(KEY, "broken", "did not start: exit 3", 1.0, 1, **answered(message)))
    with pytest.raises(Unavailable, match="exit 3"):
        await waits
    assert [record.outcome for record in around.records] == [
        "its client left",
        "did not start: exit 3",
    ]


async def test_no_slot_in_time(
    router: GatewayRouter, around: Around, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "VERDICT_S", -3600.0)
    route = router.route("h.test", "/")
    assert route is not None
    with pytest.raises(TimedOut):
        await router.acquire(route)
    (record,) = around.records
    assert "had no free slot within 3600 s: its home says nothing" in record.outcome


async def test_no_slot_in_time_and_its_home_knows_why(
    router: GatewayRouter, around: Around
) -> None:
    route = router.route("h.test", "/")
    assert route is not None
    waiting = asyncio.ensure_future(router.acquire(route))
    asked = await demand(around)
    why = "its module is being compiled"
    router.hear(Refuse(KEY, "late", why, 1.0, 1, **answered(asked)))
    with pytest.raises(TimedOut, match=f"had no free slot within 3600 s: {why}"):
        await waiting
    (record,) = around.records
    assert record.outcome.endswith(why)


@pytest.mark.parametrize("reason", ["", "it closed the connection"])
async def test_an_instance_that_does_not_answer(
    router: GatewayRouter, around: Around, reason: str
) -> None:
    route = router.route("h.test", "/")
    assert route is not None
    waiting = asyncio.ensure_future(router.acquire(route))
    asked = await demand(around)
    generation = Generation("x", InstanceId("i1"), 1)
    router.hear(Grant(KEY, 1, generation, NODE, "100.64.0.5", 80, 1, **answered(asked)))
    slot = await waiting
    if reason:
        slot.failed(reason)
    slot.release()
    (record,) = around.records
    assert (record.instance, record.node, record.option) == ("i1", NODE, "failed")
    assert record.outcome == (reason or "it ended before the first byte of an answer")


async def test_why_no_node_can_take_a_session_is_said_of_volumes_and_of_data_centers(
    router: GatewayRouter, around: Around, monkeypatch: pytest.MonkeyPatch
) -> None:
    osaka = NodeName("osaka/osaka-1")
    app = App("hello", "host", port=80, hosts=("h.test",), pinned_to=osaka)
    router.set_routes([app], [])
    route = router.route("h.test", "/")
    assert route is not None
    words = "the volumes of default/hello are on osaka/osaka-1, which does not answer"
    with pytest.raises(Unavailable, match=words):
        await router.acquire(route)
    monkeypatch.setattr(around, "live_nodes", lambda: [NODE, osaka])
    assert (await router.acquire(route)).pool == f"node {osaka}"

    router.set_routes([replace(app, pinned_to="", placement=Placement(("nara",)))], [])
    with pytest.raises(Unavailable, match="may not run in tokyo, and no data center that can"):
        await router.acquire(route)
