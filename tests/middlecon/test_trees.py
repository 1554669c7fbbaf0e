"""Hubs of several data centers: a tree of links, one copy and one sum over each."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tabane.middlecon import Change, Hub
from tabane.middlecon.frames import AGAIN, LOST, OPEN, Kind
from tabane.middlecon.receipts import Cause

ORDER = ("a", "b", "c")


class Sites:
    """Hubs `a1`, `a2`, `b1` ... in the data centers `a`, `b`, `c`."""

    def __init__(self, cluster: Any, eventually: Any, names: tuple[str, ...]) -> None:
        self.cluster = cluster
        self.eventually = eventually
        self.names = names
        self.hubs: dict[str, Hub] = {}

    async def start(self, *names: str) -> None:
        for name in names or self.names:
            hub = self.hubs[name] = await self.cluster.hub(name, datacenter=name[0])
            for peer in self.names:
                if peer == name:
                    continue
                if ORDER.index(peer[0]) > ORDER.index(name[0]):
                    hub.expect(peer)
                else:
                    hub.link(peer, self.cluster.url(peer), datacenter=peer[0])

    async def stop(self, name: str) -> None:
        await self.hubs.pop(name).aclose()

    async def whole(self) -> None:
        """All see all."""
        await self.eventually(
            lambda: all(
                hub.peers.get(peer)
                for hub in self.hubs.values()
                for peer in self.hubs
                if peer != hub.name
            )
        )

    def far_links(self) -> set[tuple[str, str]]:
        return {
            (min(hub.name, peer), max(hub.name, peer))
            for hub in self.hubs.values()
            for peer in hub._directory.links
            if peer[0] != hub.name[0]
        }


@pytest.fixture
def sites(cluster, eventually):
    return lambda *names: Sites(cluster, eventually, names)


async def members_at(sites: Sites, room: str = "r") -> dict[str, Any]:
    """A member at each hub, that answers with its own name: room by member."""
    found = {}
    for hub in sites.hubs:
        member = await sites.cluster.client(f"{hub}/m", hub)
        found[member.name] = await member.join(room)
        found[member.name].on_message(lambda message, name=member.name: name.encode())
    await sites.eventually(
        lambda: all(
            sum(member.known for member in one.members.values()) == len(found)
            for one in found.values()
        )
    )
    return found


async def test_one_link_between_two_data_centers_carries_all(sites):
    s = sites("a1", "a2", "b1", "b2")
    await s.start()
    await s.whole()
    assert len(s.far_links()) == 1
    rooms = await members_at(s)
    for name, room in rooms.items():
        replies = await room.ask(b"who?")
        others = rooms.keys() - {name}
        assert replies.answers == {other: other.encode() for other in others}
        assert set(replies.acknowledged) == others and replies.complete


async def test_calls_state_and_presence_pass_through(sites, eventually):
    s = sites("a1", "a2", "b1", "b2")
    await s.start()
    await s.whole()
    x, y = await s.cluster.client("x", "a2"), await s.cluster.client("y", "b2")
    room, other = await x.join("r"), await y.join("r")
    y.on_message(lambda message: message.sender.encode() + message.data)
    await eventually(lambda: "y" in room.members and "x" in other.members)
    assert room.members["y"].hub == "b2"
    assert await x.call("y", b"!") == b"x!"
    await y.state.put("load", b"0.7")
    await eventually(lambda: room.state["y"].get("load") == b"0.7")
    await y.state.delete("load")
    await eventually(lambda: room.state["y"] == {})
    await y.aclose()
    await eventually(lambda: "y" not in room.members)


async def test_three_data_centers_are_a_tree(sites):
    s = sites("a1", "b1", "b2", "c1")
    await s.start()
    await s.whole()
    assert len(s.far_links()) == 2
    rooms = await members_at(s)
    heard: list[tuple[str, bytes]] = []
    for name, room in rooms.items():
        room.on_message(lambda message, name=name: heard.append((name, message.data)))
    for name, room in rooms.items():
        receipt = await room.say(name.encode())
        assert set(receipt.acknowledged) == rooms.keys() - {name} and receipt.complete
    assert len(heard) == len(set(heard)) == 12


async def test_what_one_says_arrives_in_order_everywhere(sites):
    s = sites("a1", "b1", "b2", "c1")
    await s.start()
    await s.whole()
    rooms = await members_at(s)
    heard: dict[str, list[bytes]] = {name: [] for name in rooms}
    for name, room in rooms.items():
        room.on_message(lambda message, name=name: heard[name].append(message.data))
    sent = [b"%d" % number for number in range(50)]
    for data in sent[:-1]:
        await rooms["c1/m"].cast(data)
    await rooms["c1/m"].say(sent[-1])
    assert all(heard[name] == sent for name in rooms if name != "c1/m")


async def test_another_hub_takes_over_when_the_border_dies(sites, eventually):
    s = sites("a1", "b1", "b2")
    await s.start()
    await s.whole()
    assert s.far_links() == {("a1", "b1")}
    x, y = await s.cluster.client("x", "a1"), await s.cluster.client("y", "b2")
    room, other = await x.join("r"), await y.join("r")
    other.on_message(lambda message: b"")
    await eventually(lambda: "y" in room.members)
    news: list[Change] = []
    room.on_presence(lambda presence: news.append(presence.change))
    await s.stop("b1")
    await eventually(lambda: Change.UNKNOWN in news)
    await eventually(lambda: Change.BACK in news)
    assert (await room.say(b"hi")).acknowledged == ("y",)
    assert s.far_links() == {("a1", "b2")}
    await s.start("b1")
    await s.whole()
    await eventually(lambda: len(s.far_links()) == 1)
    assert (await room.say(b"hi")).acknowledged == ("y",)


async def test_the_others_stay_together_when_the_first_data_center_dies(sites, eventually):
    s = sites("a1", "b1", "c1")
    await s.start()
    await s.whole()
    await s.stop("a1")
    await s.whole()
    assert s.far_links() == {("b1", "c1")}
    await s.start("a1")
    await s.whole()
    await eventually(lambda: len(s.far_links()) == 2)
    rooms = await members_at(s)
    assert set((await rooms["a1/m"].say(b"")).acknowledged) == {"b1/m", "c1/m"}


@pytest.mark.parametrize("names", [("a1", "b1", "c1"), ("a1", "a2", "b1", "b2", "c1", "c2")])
async def test_one_that_restarts_again_and_again_is_always_found_again(sites, eventually, names):
    s = sites(*names)
    await s.start()
    await s.whole()
    for name in names[::-1] * 3:
        await s.stop(name)
        await s.start(name)
        await s.whole()
    await eventually(lambda: len(s.far_links()) == len({name[0] for name in names}) - 1)
    rooms = await members_at(s)
    for name, room in rooms.items():
        assert set((await room.say(b"")).acknowledged) == rooms.keys() - {name}


def test_a_way_of_its_own_is_not_given_up_for_one_through_others(make_brain, take):
    """A hub dials two at once: each is told by the other that it leads there, too."""
    brain = make_brain("b1", datacenter="b")
    far, near = brain.link("c1", datacenter="c"), brain.link("a1", datacenter="a")
    brain.tell(near, Kind.SYNCED)
    brain.tell(near, Kind.HUB, name="c1", value=1, data=b"c")
    brain.tell(near, Kind.HUB, name="c1", value=1, flags=OPEN, data=b"c")
    assert brain.directory.hubs["c1"] is False
    brain.relay.close(far)
    frames = take(near)
    assert (frames[-1].kind, frames[-1].flags) == (Kind.SYNCED, AGAIN)
    brain.tell(near, Kind.HUB, name="c1", value=1, flags=OPEN, data=b"c")
    brain.tell(near, Kind.SYNCED)
    assert brain.directory.hubs["c1"] is True


def test_members_behind_a_second_way_are_not_believed_before_it_is_open(make_brain):
    brain = make_brain("a1", datacenter="a")
    brain.link("b2", datacenter="b")
    other = brain.link("b1", datacenter="b")
    brain.tell(other, Kind.HUB, name="b2", value=1, data=b"b")
    brain.tell(other, Kind.MEMBER, to=1, name="x", data=b"b2")
    assert brain.directory.members == {}


@pytest.fixture
def two_ways(make_brain, take) -> tuple[Any, Any, Any]:
    """A hub that dialed a far one before its neighbour was there, which has a link there, too."""
    brain = make_brain("b2", datacenter="b")
    far = brain.link("a1", datacenter="a")
    for name in ("b1", "c1"):
        brain.tell(far, Kind.HUB, name=name, value=1, flags=OPEN, data=name[:1].encode())
        brain.tell(far, Kind.MEMBER, to=1, name=f"{name}/x", data=name.encode())
    brain.tell(far, Kind.SYNCED)
    near = brain.link("b1", datacenter="b")
    for name in ("a1", "c1"):
        brain.tell(near, Kind.HUB, name=name, value=1, flags=OPEN, data=name[:1].encode())
    take(far), take(near)
    return brain, far, near


def test_what_is_said_of_a_hub_that_is_linked_by_now_counts_for_nothing(two_ways):
    brain, far, near = two_ways
    brain.tell(near, Kind.MEMBER, to=1, name="b1/x")
    brain.tell(far, Kind.MEMBER, to=1, name="b1/y", data=b"b1")
    brain.tell(far, Kind.MEMBER, flags=LOST, to=1, name="b1/x", data=b"b1")
    members = brain.directory.members
    assert "b1/y" not in members and members["b1/x"].port is near
    assert [(port, why) for port, why in brain.directory.cuts if port is far]


def test_what_was_on_its_way_when_the_first_way_ended_costs_no_link(two_ways, take):
    brain, far, near = two_ways
    brain.relay.close(far)
    assert [f.flags for f in take(near) if f.kind == Kind.SYNCED] == [AGAIN]
    brain.tell(near, Kind.MEMBER, to=2, name="c1/y", data=b"c1")
    brain.tell(near, Kind.SYNCED)  # of what it told first
    assert not near.synced and brain.directory.members["c1/x"].port is None
    for name in ("a1", "c1"):
        brain.tell(near, Kind.HUB, name=name, value=1, flags=OPEN, data=name[:1].encode())
    brain.tell(near, Kind.MEMBER, to=2, name="c1/y", data=b"c1")
    brain.tell(near, Kind.SYNCED)
    assert {m.name: m.port for m in brain.directory.members.values()} == {"c1/y": near}
    assert brain.directory.hubs == {"a1": True, "b1": True, "c1": True}


def test_who_is_reached_in_another_way_is_not_heard_on_the_second(two_ways, take):
    brain, far, near = two_ways
    x = brain.session("x")
    room = brain.join(x, "r")
    member = brain.directory.members["x"].number
    take(x), take(near)
    for kind, to in ((Kind.SAY, room), (Kind.CAST, room), (Kind.POST, member)):
        assert brain.tell(near, kind, to=to, id=1, value=1000, name="c1/x") == []
    (nack,) = brain.tell(near, Kind.CALL, to=member, id=7, value=1000, name="c1/x")
    assert (nack.kind, nack.id) == (Kind.NACK, 7) and take(x) == []
    brain.tell(far, Kind.POST, to=member, name="c1/x")
    assert [frame.kind for frame in take(x)] == [Kind.POST]


def test_who_is_asked_tells_all_again(brain, take):
    link = brain.link("a")
    brain.session("x")
    told = [frame.kind for frame in take(link)]
    again = [frame.kind for frame in brain.tell(link, Kind.SYNCED, flags=AGAIN)]
    assert told == [Kind.SYNCED, Kind.MEMBER] and again == [Kind.MEMBER, Kind.SYNCED]


async def test_a_member_that_cannot_be_reached_is_named_once(sites, eventually):
    s = sites("a1", "a2", "b1")
    await s.start()
    await s.whole()
    x, y = await s.cluster.client("x", "a2"), await s.cluster.client("y", "b1")
    room, _ = await x.join("r"), await y.join("r")
    await eventually(lambda: "y" in room.members)
    await s.stop("b1")
    await eventually(lambda: not room.members["y"].known)
    receipt = await room.say(b"hi")
    assert {name: reason.cause for name, reason in receipt.failed.items()} == {
        "y": Cause.UNREACHABLE
    }
    assert receipt.acknowledged == receipt.unknown == ()


async def test_a_link_that_dies_under_a_message_makes_fates_unknown(sites, eventually):
    s = sites("a1", "a2", "b1")
    await s.start()
    await s.whole()
    x, y = await s.cluster.client("x", "a2"), await s.cluster.client("y", "b1")
    room, other = await x.join("r"), await y.join("r")
    began = asyncio.Event()

    @other.on_message
    async def never(message):
        began.set()
        await asyncio.Event().wait()

    await eventually(lambda: "y" in room.members)
    asking = asyncio.create_task(room.say(b"hi", timeout_s=60))
    await began.wait()
    await s.stop("b1")
    receipt = await asking
    assert receipt.unknown == ("y",)
