"""Apps of class `auto`: who is trusted shares no instance with who is not."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from tabane.gateway.messages import Demand, ToHome
from tabane.gateway.router import GatewayRouter, Local
from tabane.model import (
    App,
    AppName,
    Class,
    Instance,
    NodeName,
    Trust,
    WakeRecord,
    app_of_cohort,
    name_cohort,
)
from tabane.testing import VirtualClock

NODE = NodeName("tokyo/tokyo-1")
TOKEN = b"of the cluster"
AUTO = App("auto", "host", port=80, hosts=("auto.test",), isolation=Class.AUTO, owner=7)
PLAIN = App("plain", "host", port=80, hosts=("plain.test",), owner=7)
FOREIGN = App("foreign", "host", port=80, owner=8)


class Around:
    node, datacenter, name, token = NODE, "tokyo", "tokyo/tokyo-1/gateway-0", TOKEN.decode()

    def __init__(self) -> None:
        self.asked: asyncio.Queue[tuple[AppName, ToHome]] = asyncio.Queue()
        self.records: list[WakeRecord] = []

    def tell_home(self, app: AppName, message: ToHome) -> None:
        self.asked.put_nowait((app, message))

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
def router(around: Around) -> GatewayRouter:
    router = GatewayRouter(around, VirtualClock())
    router.set_routes([AUTO, PLAIN, FOREIGN], [])
    callers = {
        "a": Local(PLAIN.key, "10.0.0.1"),
        "b": Local(FOREIGN.key, "10.0.0.2"),
        "c": Local(AUTO.key, "10.0.0.3", Trust.ANONYMOUS),
        "d": Local(AUTO.key, "10.0.0.4", Trust.TRUSTED),
    }
    router.set_locals(callers, complete=True)
    return router


def leads_to(router: GatewayRouter, peer: str, token: bytes = b"") -> Trust | None:
    route = router.route("auto.test", "/")
    assert route is not None and route.by_caller
    app, trust = app_of_cohort(router.route_caller(route, peer, token).app)
    assert app == AUTO.key
    return trust


def test_only_apps_of_class_auto_ask_who_calls(router: GatewayRouter) -> None:
    route = router.route("plain.test", "/")
    assert route is not None and not route.by_caller
    assert route.app == PLAIN.key == PLAIN.cohort


@pytest.mark.parametrize(
    ("peer", "token", "trust"),
    [
        ("192.0.2.1", b"", Trust.ANONYMOUS),
        ("192.0.2.1", b"guessed", Trust.ANONYMOUS),
        ("192.0.2.1", TOKEN, Trust.TRUSTED),
        ("10.0.0.1", b"", Trust.TRUSTED),
        ("10.0.0.2", b"", Trust.ANONYMOUS),
        ("10.0.0.2", TOKEN, Trust.TRUSTED),
        ("10.0.0.3", b"", Trust.ANONYMOUS),
        ("10.0.0.4", b"", Trust.TRUSTED),
    ],
)
def test_who_is_trusted(router: GatewayRouter, peer: str, token: bytes, trust: Trust) -> None:
    """The cluster's token says so, or that the caller is an instance of the same owner's app.

    One that serves anybody is none: through it anybody would become trusted.
    """
    assert leads_to(router, peer, token) is trust


def test_an_instance_that_ended_is_no_caller_any_more(router: GatewayRouter) -> None:
    router.set_locals({}, complete=True)
    assert leads_to(router, "10.0.0.1") is Trust.ANONYMOUS


async def test_each_trust_asks_for_instances_of_its_own(
    router: GatewayRouter, around: Around
) -> None:
    route = router.route("auto.test", "/")
    assert route is not None
    tasks, demands = [], {}
    for token in (b"", TOKEN):
        waiting = router.acquire(router.route_caller(route, "192.0.2.1", token))
        tasks.append(asyncio.ensure_future(waiting))
    for _ in tasks:
        app, message = await around.asked.get()
        assert isinstance(message, Demand) and message.app == app
        demands[app] = message.waiting
    assert demands == {"default/auto@anonymous": 1, "default/auto@trusted": 1}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert {(record.app, record.trust) for record in around.records} == {
        (AUTO.key, Trust.ANONYMOUS),
        (AUTO.key, Trust.TRUSTED),
    }


def test_another_gateway_names_the_cohort(router: GatewayRouter) -> None:
    fields = {b"tabane-token": TOKEN, b"tabane-app": b"default/auto@trusted"}
    route = router.accept_forward(fields)
    assert getattr(route, "app", None) == "default/auto@trusted"


def test_an_app_that_is_gone_leaves_no_cohort(router: GatewayRouter) -> None:
    assert router.known_apps() == {AUTO.key, PLAIN.key, FOREIGN.key}
    router.set_routes([], [AUTO.key])
    assert router.known_apps() == {PLAIN.key, FOREIGN.key}
    assert router.route("auto.test", "/") is None


def test_an_app_that_is_auto_no_more_leaves_no_cohort(router: GatewayRouter) -> None:
    router.set_routes([msgspec.structs.replace(AUTO, isolation=Class.SANDBOX)], [])
    route = router.route("auto.test", "/")
    assert route is not None and not route.by_caller and route.app == AUTO.key


def test_names_of_cohorts() -> None:
    assert name_cohort(AUTO.key, None) == AUTO.key
    for cohort in AUTO.cohorts():
        assert app_of_cohort(cohort.cohort) == (AUTO.key, cohort.trust)
    assert PLAIN.cohorts() == (PLAIN,)


def test_an_instance_belongs_to_its_cohort() -> None:
    fields = {"node": NODE, "revision": 1, "generation": None, "state": "ready"}
    instance = msgspec.convert(
        {
            "id": "i",
            "app": AUTO.key,
            "trust": "trusted",
            **fields,
            "generation": {"incarnation": "n", "instance": "i", "counter": 1},
        },
        Instance,
    )
    assert instance.cohort == "default/auto@trusted"
