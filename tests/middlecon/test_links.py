"""Hubs that are linked, on real sockets in one process."""

from __future__ import annotations

import asyncio

import pytest

from tabane.errors import Closed, NotFound, Refused, Unreachable
from tabane.middlecon import Change, Peer, Presence


async def two_members(cluster, eventually):
    x, y = await cluster.client("x", "a"), await cluster.client("y", "b")
    room, other = await x.join("r"), await y.join("r")
    await eventually(lambda: len(room.members) == len(other.members) == 2)
    return x, y, room, other


async def test_messages_presence_and_state_go_over_a_link(cluster, eventually):
    await cluster.pair()
    x, y, room, other = await two_members(cluster, eventually)
    heard = []

    @other.on_message
    @y.on_message
    async def handle(message):
        heard.append((message.room, message.sender, message.data))
        return b"from b"

    assert await x.call("y", b"1") == b"from b"
    await x.send("y", b"2")
    x.send_nowait("y", b"3")
    assert (await room.say(b"4")).acknowledged == ("y",)
    assert (await room.ask(b"5")).answers == {"y": b"from b"}
    await room.cast(b"6")
    await x.call("y", b"7")
    assert [room for room, _, _ in heard] == [None, None, None, "r", "r", "r", None]
    assert [data for _, _, data in heard] == [b"%d" % n for n in range(1, 8)]
    assert {sender for _, sender, _ in heard} == {"x"}
    await y.state.put("load", b"1")
    await eventually(lambda: room.state["y"].get("load") == b"1")
    assert (x.hubs, y.hubs) == ({"b": True}, {"a": True})
    with pytest.raises(NotFound):
        await x.call("nobody", b"")


async def test_a_say_gathers_members_of_all_hubs(cluster, eventually):
    hubs = [await cluster.hub(name) for name in "abc"]
    for hub in hubs:
        for peer in "abc":
            if peer != hub.name:
                hub.link(peer, cluster.url(peer))
    await eventually(lambda: all(list(hub.peers.values()) == [True, True] for hub in hubs))
    members = [await cluster.client(f"{hub.name}/{n}", hub.name) for hub in hubs for n in range(3)]
    rooms = [await member.join("r") for member in members]
    for room in rooms:
        room.on_message(lambda message: message.sender.encode())
    await eventually(lambda: all(len(room.members) == 9 for room in rooms))
    for member, room in zip(members, rooms, strict=True):
        replies = await room.ask(b"")
        assert set(replies.answers) == {m.name for m in members} - {member.name}
        assert set(replies.answers.values()) == {member.name.encode()}


async def test_both_may_dial_and_one_link_stays(cluster, eventually):
    a, b = await cluster.hub("a"), await cluster.hub("b")
    for _ in range(10):
        a.link("b", cluster.url("b"))
        b.link("a", cluster.url("a"))
        await eventually(lambda: a.peers.get("b") and b.peers.get("a"))
        assert [len(hub._wires) for hub in (a, b)] == [1, 1]
        a.unlink("b")
        b.unlink("a")
        await eventually(lambda: not (a._wires or b._wires))


async def test_a_dead_link_makes_unknown_and_comes_back_by_itself(cluster, eventually):
    a, _ = await cluster.pair()
    x, y, room, _ = await two_members(cluster, eventually)
    changes, hubs = [], []
    room.on_presence(changes.append)
    x.on_hub(lambda hub, is_open: hubs.append((hub, is_open)))
    started = asyncio.Event()

    @y.on_message(concurrent=True)
    async def hang(message):
        started.set()
        await asyncio.sleep(60)

    y_room = await y.join("r")
    y_room.on_message(hang)
    call = asyncio.ensure_future(x.call("y", b"", timeout_s=60))
    saying = asyncio.ensure_future(room.say(b"", timeout_s=60))
    await started.wait()
    for wire in list(a._wires.values()):
        if wire.port.name == "b":
            wire.lose(Unreachable("cut by the test"))
    with pytest.raises(Closed, match="may have got it or not"):
        await call
    assert (await saying).unknown == ("y",)
    await eventually(lambda: len(hubs) == 2)
    assert changes == [Presence("y", Change.UNKNOWN, "b"), Presence("y", Change.BACK, "b")]
    assert hubs == [("b", False), ("b", True)]
    assert room.members["y"].known
    y.on_message(lambda message: b"again")
    assert await x.call("y", b"") == b"again"


async def test_a_hub_that_is_gone_and_one_that_is_unlinked(cluster, eventually):
    a, b = await cluster.pair()
    x, _, room, _ = await two_members(cluster, eventually)
    await b.aclose()
    await eventually(lambda: x.hubs == {"b": False})
    assert room.members["y"].known is False
    with pytest.raises(Unreachable, match="link to hub b is down"):
        await x.call("y", b"")
    assert str((await room.say(b"")).failed["y"]) == "unreachable"
    await eventually(lambda: "b" in a.troubles)
    a.unlink("b")
    await eventually(lambda: x.hubs == {} and "y" not in room.members)
    with pytest.raises(NotFound):
        await x.call("y", b"")


async def test_a_hub_started_again_is_linked_again_at_once(cluster, eventually):
    a, b = await cluster.pair()
    x, y, room, other = await two_members(cluster, eventually)
    await y.state.put("k", b"1")
    changes, of_other = [], []
    room.on_presence(changes.append)
    other.on_presence(of_other.append)
    await b.aclose()
    again = await cluster.hub("b")
    await eventually(lambda: a.peers["b"] and again.peers.get("a"))
    await eventually(lambda: room.members["y"].known and room.state["y"] == {"k": b"1"})
    assert changes == [Presence("y", Change.UNKNOWN, "b"), Presence("y", Change.BACK, "b")]
    await eventually(lambda: y.hubs == {"a": True} and other.members["x"].known)
    assert not [presence for presence in of_other if presence.change is Change.LEFT]
    y.on_message(lambda message: b"back")
    assert await x.call("y", b"") == b"back"


async def test_links_need_the_token_too(cluster, eventually):
    a = await cluster.hub("a", token="secret", listen=["tcp://127.0.0.1:0"])
    b = await cluster.hub("b", token="secret", listen=["tcp://127.0.0.1:0"])
    b.link("a", f"tcp://{a.addresses[0]}", "wrong")
    await eventually(lambda: "not that of this cluster" in b.troubles.get("a", ""))
    b.link("a", f"tcp://{a.addresses[0]}", "secret")
    await eventually(lambda: a.peers.get("b") and b.peers["a"])


async def test_a_hub_at_an_address_of_another_is_refused(cluster, eventually):
    a = await cluster.hub("a")
    await cluster.hub("c")
    a.link("b", cluster.url("c"))
    await eventually(lambda: "is c, not b" in a.troubles.get("b", ""))
    a.link("a2", cluster.url("a"))
    await eventually(lambda: "two hubs are named a" in a.troubles.get("a2", ""))
    assert a.peers == {"b": False, "a2": False}


async def test_after_its_hubs_restart_a_member_forgets_who_is_not_linked_again(
    cluster, eventually, monkeypatch
):
    monkeypatch.setattr("tabane.middlecon.client.RETURN_S", 0.3)
    a, _ = await cluster.pair()
    _, y, room, _ = await two_members(cluster, eventually)
    changes = []
    room.on_presence(changes.append)
    await y.state.put("k", b"1")
    await eventually(lambda: room.state["y"] == {"k": b"1"})
    await a.aclose()
    await cluster.hub("a")
    await eventually(lambda: changes)
    assert changes == [Presence("y", Change.UNKNOWN, "b")]
    assert room.state["y"] == {"k": b"1"}
    await eventually(lambda: "y" not in room.members)


async def test_after_its_hubs_restart_a_member_learns_what_changed_behind_the_link(
    cluster, eventually
):
    a, _ = await cluster.pair()
    _, y, room, _ = await two_members(cluster, eventually)
    z = await cluster.client("z", "b")
    await z.join("r")
    await y.state.put("old", b"1")
    await eventually(lambda: room.state["y"] and "z" in room.members)
    changes = []
    room.on_presence(changes.append)
    await a.aclose()
    await z.aclose()
    await y.state.delete("old")
    await y.state.put("new", b"2")
    again = await cluster.hub("a")
    await eventually(lambda: len(changes) == 2)
    again.link("b", cluster.url("b"))
    await eventually(lambda: room.state["y"] == {"new": b"2"})
    unknown = [Presence(name, Change.UNKNOWN, "b") for name in "yz"]
    assert sorted(changes[:2], key=lambda p: p.member) == unknown
    assert changes[2:] == [Presence("y", Change.BACK, "b"), Presence("z", Change.LEFT, "b")]


async def test_a_hub_that_is_said_to_be_gone_is_gone_once_its_link_is(cluster, eventually):
    a, b = await cluster.pair()
    _x, _y, room, _ = await two_members(cluster, eventually)
    changes = []
    room.on_presence(lambda presence: changes.append(presence.change))
    a.set_peers([])
    assert a.peers == {"b": True}
    await b.aclose()
    await eventually(lambda: changes and changes[-1] is Change.LEFT)
    assert a.peers == {}


async def test_only_root_may_say_which_hubs_there_are(cluster, eventually):
    hub = await cluster.hub("a")
    me = await cluster.client("me", "a")
    await me.set_hubs([Peer("b", cluster.url("b")), Peer("c")])
    assert hub.peers == {"b": False, "c": False}
    await cluster.hub("b")
    await eventually(lambda: hub.peers["b"])
    await me.set_hubs([Peer("b", cluster.url("b"))])
    assert hub.peers == {"b": True}
    with pytest.raises(Refused, match="no hub's address"):
        await me.set_hubs([Peer("d", "nowhere")])
