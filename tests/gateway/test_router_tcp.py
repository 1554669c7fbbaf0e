"""Which app has which TCP port, where its slots lead, and by which names instances find it."""

from __future__ import annotations

import asyncio

import pytest

from tabane.errors import Stale
from tabane.gateway.api import Route, Slot
from tabane.gateway.messages import Demand, Grant, ToHome
from tabane.gateway.router import GatewayRouter, Local
from tabane.model import App, AppName, Generation, InstanceId, NodeName, TcpPort, WakeRecord
from tabane.testing import VirtualClock

HERE, THERE = NodeName("tokyo/tokyo-1"), NodeName("tokyo/tokyo-2")
MAIL = App("mail", "host", revision=1, tcp=(TcpPort(25, 2525, 60.0, "v1"), TcpPort(587, 587)))
KEY = MAIL.key
GENERATION = Generation("incarnation", InstanceId("i1"), 1)


class Around:
    """A node whose home says nothing by itself."""

    node, datacenter, name, token = HERE, "tokyo", "tokyo/tokyo-1/gateway-0", "secret"

    def __init__(self) -> None:
        self.told: asyncio.Queue[ToHome] = asyncio.Queue()
        self.records: list[WakeRecord] = []

    def tell_home(self, app: AppName, message: ToHome) -> None:
        self.told.put_nowait(message)

    def gateway_of(self, node: NodeName) -> tuple[str, int]:
        return ("10.0.0.3", 7072)

    def live_nodes(self) -> list[NodeName]:
        return [HERE, THERE]

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
    router.set_routes([MAIL], [])
    return router


def ports(router: GatewayRouter) -> dict[int, AppName]:
    found = {port: router.tcp_route(port) for port in (25, 80, 587, 2525)}
    return {port: route.route.app for port, route in found.items() if route is not None}


def test_a_port_leads_to_its_app_with_what_it_asked_for(router: GatewayRouter) -> None:
    assert ports(router) == {25: KEY, 587: KEY}
    route = router.tcp_route(25)
    assert route is not None
    assert (route.session_idle_s, route.proxy_protocol) == (60.0, "v1")


def test_ports_come_and_go_with_revisions_and_to_other_apps(router: GatewayRouter) -> None:
    router.set_routes([App("mail", "host", revision=2, tcp=(TcpPort(25, 25),))], [])
    assert ports(router) == {25: KEY}
    other = App("other", "host", revision=1, tcp=(TcpPort(587, 1), TcpPort(2525, 2)))
    router.set_routes([other], [])
    assert ports(router) == {25: KEY, 587: other.key, 2525: other.key}
    router.set_routes([], [KEY])
    assert ports(router) == {587: other.key, 2525: other.key}


def test_instances_find_it_by_name_and_http_does_not(router: GatewayRouter) -> None:
    for name in ("mail.tabane", "mail.default.tabane"):
        assert router.is_app(name)
        assert router.route(name, "/") is None
    router.set_routes([App("mail", "host", revision=2, port=80, tcp=MAIL.tcp)], [])
    assert router.route("mail.tabane", "/") is not None
    router.set_routes([], [KEY])
    assert not router.is_app("mail.tabane")


async def granted(router: GatewayRouter, around: Around, node: NodeName = HERE) -> Slot:
    """A slot that its session had to wait for."""
    found = router.tcp_route(25)
    assert found is not None
    waiting = asyncio.ensure_future(router.acquire(found.route))
    demand = await around.told.get()
    assert isinstance(demand, Demand)
    router.hear(
        Grant(KEY, 1, GENERATION, node, "100.64.0.9", 0, 1, demand.epoch, 1, tcp=((25, 2525),))
    )
    return await waiting


async def test_a_wake_of_whom_nothing_is_said_to_took_until_it_was_reached(
    router: GatewayRouter, around: Around, clock: VirtualClock
) -> None:
    slot = await granted(router, around)
    clock.advance(0.25)
    slot.reached()
    clock.advance(3600.0)
    slot.release()
    (record,) = around.records
    assert (record.outcome, record.total_us) == ("ok", 250_000)


async def test_a_wake_takes_until_the_first_byte_where_there_is_one(
    router: GatewayRouter, around: Around, clock: VirtualClock
) -> None:
    slot = await granted(router, around)
    slot.reached()
    clock.advance(0.5)
    slot.first_byte()
    clock.advance(3600.0)
    slot.release()
    (record,) = around.records
    assert (record.outcome, record.phases_us["first_byte"]) == ("ok", 500_000)


async def test_who_could_not_be_reached_was_not_woken(
    router: GatewayRouter, around: Around
) -> None:
    slot = await granted(router, around)
    slot.failed("connection refused")
    slot.release()
    assert [record.outcome for record in around.records] == ["connection refused"]


@pytest.mark.parametrize("node", [HERE, THERE])
async def test_a_slot_leads_to_the_port_of_its_own_revision(
    router: GatewayRouter, around: Around, node: NodeName
) -> None:
    slot = await granted(router, around, node)
    assert slot.target(25) == 2525
    assert slot.target(587) is None
    assert slot.host == ("100.64.0.9" if node == HERE else "10.0.0.3")
    told = dict(slot.headers)
    assert told.get(b"tabane-generation", b"") == (
        b"" if node == HERE else str(GENERATION).encode()
    )
    slot.release()


def test_another_gateway_reaches_an_instance_that_is_here_and_no_other(
    router: GatewayRouter,
) -> None:
    headers = {b"tabane-token": b"secret", b"tabane-generation": str(GENERATION).encode()}
    with pytest.raises(Stale):
        router.accept_forward(headers)
    router.set_locals({str(GENERATION): Local(KEY, "100.64.0.9")}, complete=True)
    slot = router.accept_forward(headers)
    assert not isinstance(slot, Route)
    assert (slot.host, slot.pool, slot.target(2525)) == ("100.64.0.9", str(GENERATION), 2525)
