"""A name belongs to one session of all hubs, and a receipt tells of both when two had it."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis.stateful import rule
from tests.middlecon.network import PAIR, TREE, Network, hub_of, machine

from tabane.errors import Conflict
from tabane.middlecon import Client
from tabane.middlecon.client import connect
from tabane.middlecon.frames import GONE, LOST, Frame, Kind
from tabane.middlecon.ports import SessionPort
from tabane.middlecon.receipts import Cause, Sum, parse_receipt


async def move(cluster, client: Client, hub: str) -> Client:
    """The same run of a program, at another hub."""
    moved = Client(cluster.url(hub), client.name, None)
    moved._connection._hello.instance = client._connection._hello.instance
    await cluster._stack.enter_async_context(moved)
    await moved._connection.start(0.0)
    return moved


async def test_a_name_that_another_hub_has_is_taken(cluster, eventually):
    a, b = await cluster.pair()
    x = await cluster.client("x", "a")
    await eventually(lambda: b.members == {"x": "a"})
    with pytest.raises(Conflict, match="taken by a session of hub a"):
        await connect(cluster.url("b"), name="x", timeout_s=0.0)
    await x.aclose()
    await eventually(lambda: b.members == {})
    await cluster.client("x", "b")
    await eventually(lambda: a.members == {"x": "b"})


async def test_a_member_moves_to_another_hub_at_once(cluster, eventually):
    a, b = await cluster.pair()
    x, asker = await cluster.client("x", "a"), await cluster.client("asker", "a")
    await x.join("r")
    room = await asker.join("r")
    await eventually(lambda: b.members.get("x") == "a")
    moved = await move(cluster, x, "b")
    (await moved.join("r")).on_message(lambda message: b"from b")
    await eventually(lambda: room.members.get("x") and room.members["x"].hub == "b")
    assert (await room.ask(b"")).answers == {"x": b"from b"}
    assert "hub b has a session with the name x" in x.trouble
    assert a.members["x"] == b.members["x"] == "b" and moved.connected


async def test_a_name_behind_a_link_that_is_down_is_free(cluster, eventually):
    a, b = await cluster.pair()
    await cluster.client("x", "a")
    await eventually(lambda: b.members == {"x": "a"})
    await a.aclose()
    await cluster.client("x", "b", timeout_s=0.0)


async def test_of_two_that_had_one_name_before_there_was_a_link_one_is_left(cluster, eventually):
    a, b = await cluster.hub("a"), await cluster.hub("b")
    both = [await cluster.client("x", "a"), await cluster.client("x", "b")]
    for x in both:
        (await x.join("r")).on_message(lambda message: None)
    asker = await cluster.client("asker", "a")
    room = await asker.join("r")
    a.link("b", cluster.url("b"))
    await eventually(lambda: sum(x.connected for x in both) == 1)
    await eventually(lambda: all(x.connected or "taken by a session" in x.trouble for x in both))
    (left,) = (x for x in both if x.connected)
    await eventually(lambda: a.members.get("x") == b.members.get("x") == left.hub)
    await eventually(lambda: "x" in room.members and room.members["x"].known)
    assert (await room.say(b"")).acknowledged == ("x",)


def test_a_receipt_tells_that_one_of_two_failed(make_brain, take):
    """The member was cut off here without an answer, and has acknowledged there."""
    brain = make_brain("a")
    x, asker, link = brain.session("x"), brain.session("asker"), brain.link("b")
    number = [brain.join(port, "r") for port in (x, asker)][-1]
    for name, to in (("y", 1), ("x", 2)):
        if name == "x":
            brain.tell(asker, Kind.SAY, to=number, id=9, value=1000)
            (copy,) = [frame for frame in take(link) if frame.kind == Kind.SAY]
        brain.tell(link, Kind.MEMBER, to=to, name=name)
        brain.tell(link, Kind.PRESENCE, to=7, name=name, data=b"r")
    assert x not in brain.directory.sessions and brain.directory.members["x"].hub == "b"
    take(asker)
    brain.relay._on_receipt(link, Frame(Kind.RECEIPT, id=copy.id, data=sum_of("x", "y")), 0.0)
    (receipt,) = [parse_receipt(f) for f in take(asker) if f.kind == Kind.RECEIPT]
    assert receipt.acknowledged == ["y"] and receipt.failed["x"].cause is Cause.CLOSED


def sum_of(*names: str) -> bytes:
    return msgspec.msgpack.encode(Sum(acknowledged=list(names)))


def test_what_a_peer_says_of_our_own_members_is_not_believed(make_brain):
    brain = make_brain("a")
    x, link = brain.session("x"), brain.link("b")
    for name in ("x", "y"):
        brain.tell(link, Kind.MEMBER, to=1, name=name, data=b"a")
    assert x in brain.directory.sessions and set(brain.directory.members) == {"x"}


def test_what_is_lost_on_one_way_takes_no_name_from_who_is_there(make_brain):
    """The old session ended behind a link that was down, and another one has its name."""
    brain = make_brain("a")
    there, back = brain.link("b"), brain.link("c")
    brain.tell(there, Kind.MEMBER, to=1, name="x")
    brain.tell(back, Kind.MEMBER, to=1, flags=LOST, name="x")
    brain.tell(back, Kind.MEMBER, flags=GONE, name="x")
    assert {m.name: m.hub for m in brain.directory.members.values()} == {"x": "b"}


async def test_people_stay_whatever_a_peer_calls_its_members(cluster, eventually):
    a, b = await cluster.pair()
    reader, writer = await asyncio.open_unix_connection(cluster.url("a").removeprefix("unix://"))
    await eventually(lambda: a.people and b.members.get("people@a") == "a")
    b._directory.open_session(SessionPort("people@a", lambda: None))
    x = await cluster.client("x", "b")
    await eventually(lambda: "x" in a.members)
    room = await (await cluster.client("y", "a")).join("lobby")
    assert (await room.say(b"hello")).told == 1
    assert await reader.readline() == b"y: hello\n"
    assert x.connected
    writer.close()
    await writer.wait_closed()


class Namesakes(Network):
    """All hubs let in whoever comes, under two names: more than real ones ever would."""

    def __init__(self) -> None:
        super().__init__()
        for relay in self.relays.values():
            relay._directory.on_namesake = lambda port, hub: self.end(port)

    def called(self, name: str) -> str:
        return name[2:]

    def end(self, port: SessionPort) -> None:
        (name,) = (name for name, other in self.ports.items() if other is port)
        self.do_crash(name)

    def do_settle(self) -> None:
        self.carry_all(2)

    def teardown(self) -> None:
        """When all has travelled, a name has one session or none, and all hubs know where."""
        self.link_anew()
        self.carry_all(4)
        where = {self.called(name): hub_of(name) for name in self.ports}
        assert len(where) == len(self.ports)
        for relay in self.relays.values():
            directory = relay._directory
            assert {m.name: m.hub for m in directory.members.values()} == where
            room = directory.rooms.get("r")
            here = {member.name for member, _ in room.members()} if room is not None else set()
            assert here == {self.called(name) for name in self.numbers}


TestPair = machine(Namesakes, PAIR, lambda names: {"do_settle": rule()})
TestTree = machine(Namesakes, TREE, lambda names: {"do_settle": rule()})
