"""Apps' rooms: which node is in them for an app, and what becomes of what is said there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from tabane.errors import Closed, TimedOut, Unavailable
from tabane.middlecon import Client, Hub, connect
from tabane.model import App, AppName, Placement, Reactive
from tabane.node import requesting
from tabane.node.requesting import MAX_BODY_BYTES, Request, ask_app
from tabane.node.rooms import Rooms
from tabane.reactions import Trigger
from tabane.supervise import Later, Supervisor

OWN = "tokyo/tokyo-1"
ORDERS = Trigger("order", room="orders", path="/orders")
APP = App("shop", "host", port=80, revision=1, triggers=(ORDERS,))
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone"
ASK = Request("POST", "/", {}, b"body")


class Gateway:
    """What stands for the node's gateway: says `answer` to each request, and keeps it."""

    def __init__(self) -> None:
        self.answer = OK
        self.requests: list[bytes] = []
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        self.requests.append(head + await reader.readexactly(length))
        await self.goes_on.wait()
        writer.write(self.answer)
        writer.close()

    async def has_got(self, count: int) -> None:
        async with asyncio.timeout(60):
            while len(self.requests) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.002)


class Node:
    def __init__(self, directory: Path, tasks: Supervisor) -> None:
        self.live = [OWN]
        self.later = Later()
        config = SimpleNamespace(
            key=OWN,
            node=SimpleNamespace(address="127.0.0.1"),
            paths=SimpleNamespace(hub=directory / "hub"),
        )
        self.on_hub: list[Callable[[str, bool], object]] = []
        self.agent: Any = SimpleNamespace(
            config=config,
            tasks=tasks,
            later=self.later,
            nodes=SimpleNamespace(live_nodes=lambda: self.live),
            me=SimpleNamespace(on_hub=self.on_hub.append),
        )
        self.apps: dict[AppName, App] = {APP.key: APP}
        self.rooms = Rooms(self.agent, self.apps)


@pytest.fixture
async def gateway(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    made = Gateway()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    monkeypatch.setattr(requesting, "HTTP_PORT", server.sockets[0].getsockname()[1])
    yield made
    made.goes_on.set()
    server.close()
    await server.wait_closed()


@pytest.fixture
async def node(tmp_path: Path, gateway: Gateway) -> AsyncIterator[Node]:
    async with Hub("hub", listen=[f"unix://{tmp_path}/hub"]), Supervisor("test") as tasks:
        made = Node(tmp_path, tasks)
        yield made
        made.later.close()


@pytest.fixture
async def customer(node: Node, tmp_path: Path) -> AsyncIterator[Client]:
    async with await connect(f"unix://{tmp_path}/hub", name="customer") as me:
        yield me


async def members(client: Client, count: int, name: str = "orders") -> set[str]:
    room = await client.join(name, member=False)
    async with asyncio.timeout(60):
        while len(room.members) != count:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
    return set(room.members)


async def test_what_is_said_is_a_request_and_its_answer_the_reply(
    node: Node, customer: Client, gateway: Gateway
) -> None:
    node.rooms.start()
    assert await members(customer, 1) == {f"default/shop@{OWN}"}
    room = await customer.join("orders", member=False)
    replies = await room.ask(b"two coffees\r\n")
    assert list(replies.answers.values()) == [b"done"]
    head, _, body = gateway.requests[0].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /orders HTTP/1.1"
    assert {
        "Host: shop.default.tabane",
        "X-Tabane-Trigger: order",
        "X-Tabane-Room: orders",
        "X-Tabane-Sender: customer",
        "Content-Length: 13",
    } <= set(lines)
    assert body == b"two coffees\r\n"


async def test_it_is_acknowledged_only_when_the_app_has_it(
    node: Node, customer: Client, gateway: Gateway
) -> None:
    node.rooms.start()
    (member,) = await members(customer, 1)
    room = await customer.join("orders", member=False)
    gateway.goes_on.clear()
    receipt = await room.say(b"slow", timeout_s=0.05)
    assert receipt.failed.keys() == {member}
    gateway.goes_on.set()
    gateway.answer = b"HTTP/1.1 503 Full\r\nContent-Length: 4\r\n\r\nfull"
    receipt = await room.say(b"refused")
    assert "answered 503: full" in receipt.failed[member].text
    gateway.answer = b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"
    receipt = await room.say(b"misled")
    assert "answered 404" in receipt.failed[member].text
    gateway.answer = OK
    assert (await room.say(b"good")).acknowledged == (member,)


async def test_one_senders_come_in_order_and_several_at_once(
    node: Node, customer: Client, gateway: Gateway, tmp_path: Path
) -> None:
    node.rooms.start()
    await members(customer, 1)
    room = await customer.join("orders", member=False)
    gateway.goes_on.clear()
    async with await connect(f"unix://{tmp_path}/hub", name="other") as other:
        theirs = await other.join("orders", member=False)
        for number in range(3):
            await room.cast(b"mine %d" % number)
            await theirs.cast(b"theirs %d" % number)
        await gateway.has_got(2)
        assert {request[-2:] for request in gateway.requests} == {b" 0"}
        gateway.goes_on.set()
        await gateway.has_got(6)
    bodies = [request.partition(b"\r\n\r\n")[2] for request in gateway.requests]
    for who in (b"mine", b"theirs"):
        assert [b for b in bodies if b.startswith(who)] == [b"%b %d" % (who, n) for n in range(3)]


async def test_one_node_is_there_for_it_and_goes_when_it_is_not_to_be(
    node: Node, customer: Client
) -> None:
    node.rooms.start()
    await members(customer, 1)
    elsewhere = replace(APP, placement=Placement(("osaka",)))
    node.apps[APP.key] = elsewhere
    node.rooms.settle_soon()
    await members(customer, 0)
    node.apps[APP.key] = APP
    node.on_hub[0]("osaka/osaka-1", True)
    await members(customer, 1)
    node.apps[APP.key] = replace(APP, triggers=(replace(ORDERS, room="others"),))
    node.rooms.settle_soon()
    await members(customer, 0)
    await members(customer, 1, "others")
    del node.apps[APP.key]
    node.rooms.settle_soon()
    await members(customer, 0, "others")


@pytest.mark.parametrize("app", [f"shop-{number}" for number in range(5)])
async def test_of_all_nodes_exactly_one_is_there(node: Node, app: str) -> None:
    """Each computes it from the nodes that it sees."""
    node.live = [OWN, "tokyo/tokyo-2", "osaka/osaka-1"]
    found = []
    for one in node.live:
        node.agent.config.key = one
        found.append(node.rooms._rooms_of(replace(APP, name=app)))
    assert sorted(found) == [(), (), ("orders",)]


# The request itself


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (b"", Closed, "broke its answer off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", Closed, "broke its answer off"),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 6\r\n\r\nwhy so", Unavailable, "502: why so"),
    ],
)
async def test_what_may_not_have_reached_the_app_is_an_error(
    node: Node, gateway: Gateway, answer: bytes, error: type[Exception], words: str
) -> None:
    gateway.answer = answer
    with pytest.raises(error, match=words):
        await ask_app(node.agent, APP, ASK)


async def test_no_answer_is_waited_for_as_long_as_its_app_may_take(
    node: Node, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requesting, "GRACE_S", 0.0)
    gateway.goes_on.clear()
    quick = replace(APP, reactive=Reactive(start_timeout_s=0.01, response_timeout_s=0.01))
    with pytest.raises(TimedOut, match=r"within 0\.02 s"):
        await ask_app(node.agent, quick, ASK)


async def test_interim_answers_are_passed_over_and_long_ones_cut(
    node: Node, gateway: Gateway
) -> None:
    gateway.answer = b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK
    response = await ask_app(node.agent, APP, ASK)
    assert (response.status, response.body) == (200, b"done")
    size = 3 * MAX_BODY_BYTES
    gateway.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size)
    response = await ask_app(node.agent, APP, ASK)
    assert len(response.body) == MAX_BODY_BYTES + 1
