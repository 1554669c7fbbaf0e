"""Hub and client on real sockets in one process."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from tabane.errors import (
    Busy,
    Closed,
    Conflict,
    Denied,
    NotFound,
    Refused,
    Stale,
    TimedOut,
    Unauthenticated,
    Unreachable,
    UsageError,
)
from tabane.middlecon import Cause, Change, Limits, Presence, StateChange, connect
from tabane.middlecon.frames import DATA_BYTES


async def test_the_example_of_the_manual(cluster):
    await cluster.hub()
    me, web_2 = await cluster.client("web-1"), await cluster.client("web-2")
    room, other = await me.join("deploys"), await web_2.join("deploys")
    said = []

    @other.on_message
    async def heard(message):
        said.append((message.sender, message.data, message.room, message.wants_reply))
        return b"ok"

    receipt = await room.say(b"v42 is out", timeout_s=1.0)
    assert (receipt.acknowledged, receipt.failed, receipt.complete) == (("web-2",), {}, True)
    replies = await room.ask(b"load?", timeout_s=1.0)
    assert replies.answers == {"web-2": b"ok"}
    await room.cast(b"tick")
    await web_2.state.put("load", b"0.7")
    assert (await me.join("deploys")) is room
    assert await room.ask(b"again") and room.state["web-2"]["load"] == b"0.7"
    assert said == [
        ("web-1", b"v42 is out", "deploys", False),
        ("web-1", b"load?", "deploys", True),
        ("web-1", b"tick", "deploys", False),
        ("web-1", b"again", "deploys", True),
    ]


async def test_calls_and_the_errors_they_raise(cluster):
    await cluster.hub()
    x, y = await cluster.client("x"), await cluster.client("y")
    with pytest.raises(Refused, match="y takes no messages"):
        await x.call("y", b"")

    @y.on_message
    async def handle(message):
        if message.data == b"stale":
            raise Stale("generation 3 is no longer current")
        if message.data == b"slow":
            await asyncio.sleep(60)
        assert message.room is None
        return message.data * 2

    assert await x.call("y", b"ab") == b"abab"
    assert await x.send("y", b"ab") is None
    with pytest.raises(Refused, match="generation 3") as refused:
        await x.call("y", b"stale")
    assert refused.value.reason == "stale"
    with pytest.raises(NotFound, match="no member nobody"):
        await x.call("nobody", b"")
    with pytest.raises(TimedOut):
        await x.call("y", b"slow", timeout_s=0.03)
    with pytest.raises(UsageError, match="cut it up"):
        await x.call("y", b"x" * ((1 << 20) + 1))


async def test_a_handler_with_a_bug_is_reported_and_refuses(cluster, caplog):
    await cluster.hub()
    x, y = await cluster.client("x"), await cluster.client("y")

    @y.on_message
    def handle(message):
        return 1 / 0 if message.data else "text"

    with pytest.raises(Refused, match="ZeroDivisionError"):
        await x.call("y", b"1")
    with pytest.raises(Refused, match="returns bytes or None, not str"):
        await x.call("y", b"")
    assert "ZeroDivisionError" in caplog.text


async def test_one_senders_messages_are_handled_in_order_and_others_overlap(cluster):
    await cluster.hub()
    x, y, z = [await cluster.client(name) for name in "xyz"]
    log, gate = [], asyncio.Event()

    @z.on_message
    async def handle(message):
        log.append(message.data)
        if message.data == b"1":
            await gate.wait()

    first = asyncio.ensure_future(x.call("z", b"1"))
    await asyncio.sleep(0)
    x.send_nowait("z", b"2")
    third = asyncio.ensure_future(x.send("z", b"3"))
    await asyncio.sleep(0)
    await y.call("z", b"of y")
    assert log == [b"1", b"of y"]
    gate.set()
    await asyncio.gather(first, third)
    assert log == [b"1", b"of y", b"2", b"3"]


async def test_concurrent_handlers_begin_in_order_and_may_overlap(cluster):
    await cluster.hub()
    x, z = await cluster.client("x"), await cluster.client("z")
    log, gate = [], asyncio.Event()

    @z.on_message(concurrent=True)
    async def handle(message):
        log.append(message.data)
        if message.data == b"slow":
            await gate.wait()

    slow = asyncio.ensure_future(x.call("z", b"slow"))
    await asyncio.sleep(0)
    await x.call("z", b"quick")
    assert log == [b"slow", b"quick"] and not slow.done()
    gate.set()
    await slow


async def test_two_who_say_to_each_other_do_not_wait_for_each_other(cluster):
    await cluster.hub()
    x, y = await cluster.client("x"), await cluster.client("y")

    async def answer_by_asking_back(message):
        me, other = (x, "y") if message.sender == "y" else (y, "x")
        return b"end" if message.data == b"back" else await me.call(other, b"back", timeout_s=5)

    x.on_message(answer_by_asking_back)
    y.on_message(concurrent=True)(answer_by_asking_back)
    assert await y.call("x", b"go", timeout_s=5) == b"end"
    assert await x.call("y", b"go", timeout_s=5) == b"end"


async def test_a_crash_is_told_at_once(cluster, eventually):
    await cluster.hub()
    x, y = await cluster.client("x"), await cluster.client("y")
    room, other = await x.join("r"), await y.join("r")
    started, changes = asyncio.Event(), []
    room.on_presence(changes.append)

    @other.on_message
    @y.on_message
    async def hang(message):
        started.set()
        await asyncio.sleep(60)

    call = asyncio.ensure_future(x.call("y", b"", timeout_s=60))
    saying = asyncio.ensure_future(room.say(b"", timeout_s=60))
    await started.wait()
    y.abort()
    with pytest.raises(Closed, match="y went away"):
        await call
    assert {n: r.cause for n, r in (await saying).failed.items()} == {"y": Cause.CLOSED}
    assert changes[0] == Presence("y", Change.LEFT, "hub")
    await eventually(lambda: "y" in room.members)
    assert changes[1:] == [Presence("y", Change.JOINED, "hub")]


async def test_what_waits_when_the_session_ends_fails_with_closed(cluster):
    await cluster.hub()
    x, y = await cluster.client("x"), await cluster.client("y")

    @y.on_message
    async def hang(message):
        x.abort()
        await asyncio.sleep(60)

    with pytest.raises(Closed):
        await x.call("y", b"", timeout_s=60)
    with pytest.raises(Closed, match="no session"):
        x.send_nowait("y", b"")
    assert not x.connected


async def test_a_lost_session_is_told_and_a_closed_one_is_not(cluster, eventually):
    await cluster.hub()
    x = await cluster.client("x")
    told = []
    x.on_disconnected(lambda: told.append(x.connected))
    x.abort()
    assert told == [False]
    await eventually(lambda: x.connected)
    await x.aclose()
    assert told == [False]


async def test_after_a_restart_of_the_hub_all_is_as_before(cluster, eventually, tmp_path):
    hub = await cluster.hub()
    x, y = await cluster.client("x"), await cluster.client("y")
    room, other = await x.join("r"), await y.join("r")
    news, back = [], []
    room.on_state(news.append)
    x.on_connected(lambda: back.append("x"))

    @y.on_connected
    async def again():
        back.append("y")

    @other.on_message
    async def heard(message):
        return b"still here"

    await y.state.put("old", b"1")
    await y.state.put("kept", b"1")
    await room.ask(b"")
    await hub.aclose()
    with pytest.raises(Closed):
        await room.say(b"")
    await y.state.delete("old")
    await y.state.put("new", b"2")
    await cluster.hub()
    await eventually(lambda: sorted(back) == ["x", "y"] and "new" in room.state["y"])
    assert (await room.ask(b"")).answers == {"y": b"still here"}
    assert dict(room.state["y"]) == {"kept": b"1", "new": b"2"}
    assert StateChange("y", "new", b"2") in news
    assert set(room.members) == {"x", "y"}


async def test_state_is_told_to_watchers_and_gone_with_the_session(cluster, eventually):
    await cluster.hub()
    x, y = await cluster.client("x"), await cluster.client("y")
    await y.state.put("load", b"1")
    room = await x.join("r")
    await y.join("r")
    changes = []
    room.on_state(changes.append)
    await y.state.put("load", b"2")
    await y.state.put("load", b"2")
    await y.state.delete("load")
    await eventually(lambda: len(changes) == 2)
    assert changes == [StateChange("y", "load", b"2"), StateChange("y", "load", None)]
    await y.aclose()
    await eventually(lambda: "y" not in room.members)
    with pytest.raises(KeyError):
        room.state["y"]


async def test_limits_of_state_are_errors_and_change_nothing(cluster):
    await cluster.hub(limits=Limits(state_bytes=3))
    x = await cluster.client("x")
    await x.state.put("k", b"123")
    with pytest.raises(Busy):
        await x.state.put("k", b"1234")
    with pytest.raises(Busy):
        await x.state.put("l", b"1234")
    assert dict(x.state) == {"k": b"123"}


async def test_who_left_a_room_hears_nothing_and_cannot_speak(cluster):
    await cluster.hub()
    x, y = await cluster.client("x"), await cluster.client("y")
    room, other = await x.join("r"), await y.join("r")
    other.leave()
    other.leave()
    with pytest.raises(Closed, match="not in the room"):
        await other.cast(b"")
    rejoined = await y.join("r", member=False)
    assert rejoined is not other
    assert (await room.say(b"")).acknowledged == ()


async def test_names(cluster):
    await cluster.hub()
    await cluster.client("x")
    with pytest.raises(Conflict, match="x is taken"):
        await connect(cluster.url(), name="x", timeout_s=0)


async def test_the_name_of_an_ended_process_is_free_at_once(cluster, monkeypatch):
    hub = await cluster.hub()
    old = await cluster.client("x")
    monkeypatch.setattr("tabane.middlecon.hub._is_alive", lambda pid: False)
    async with await connect(cluster.url(), name="x", timeout_s=0):
        assert not old.connected or hub.members == {"x": "hub"}


class TestWhoMayComeIn:
    async def test_a_token_on_tcp(self, cluster):
        hub = await cluster.hub(listen=["tcp://127.0.0.1:0"], token="secret")
        url = f"tcp://{hub.addresses[0]}"
        with pytest.raises(Unauthenticated, match="wants the cluster's token"):
            await connect(url, name="x")
        with pytest.raises(Denied, match="not that of this cluster"):
            await connect(url, name="x", token="wrong")
        x = await cluster.client("x", url=url, token="secret")
        assert x.connected and hub.members == {"x": "hub"}

    async def test_our_own_user_on_a_unix_socket(self, cluster):
        await cluster.hub(token="secret")
        assert (await cluster.client("x")).connected

    async def test_another_user_on_a_unix_socket_needs_the_token(self, cluster, monkeypatch):
        await cluster.hub(token="secret")
        monkeypatch.setattr("tabane.security.identity.Principal.is_root", False)
        with pytest.raises(Denied, match="show the token"):
            await connect(cluster.url(), name="x")

    async def test_without_a_token_only_the_loopback_is_served(self, cluster):
        with pytest.raises(UsageError, match="needs a token"):
            await cluster.hub(listen=["tcp://0.0.0.0:0"])

    async def test_no_more_sessions_than_allowed(self, cluster):
        await cluster.hub(limits=Limits(sessions=1))
        await cluster.client("x")
        with pytest.raises(Busy, match="the most it takes"):
            await connect(cluster.url(), name="y", timeout_s=0)


async def test_nobody_there(cluster, tmp_path):
    with pytest.raises(Unreachable):
        await connect(f"unix://{tmp_path}/none", timeout_s=0.1)
    with pytest.raises(UsageError, match="no hub's address"):
        await connect("http://x")


async def test_listening_sockets_that_were_inherited(cluster, tmp_path):
    sockets = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_INET)]
    sockets[0].bind(f"{tmp_path}/inherited")
    sockets[1].bind(("127.0.0.1", 0))
    kept = [os.dup(sock.fileno()) for sock in sockets]
    for sock in sockets:
        sock.listen()
    hub = await cluster.hub(listen=sockets)
    for url in (f"unix://{tmp_path}/inherited", f"tcp://{hub.addresses[1]}"):
        await cluster.client(None, url=url)
    assert len(hub.members) == 2
    await hub.aclose()
    assert (tmp_path / "inherited").exists()
    for fd in kept:
        os.close(fd)


async def test_a_socket_whose_path_is_longer_than_an_address_holds(cluster, tmp_path):
    deep = tmp_path.joinpath(*["directory" * 5] * 5)
    deep.mkdir(parents=True)
    await cluster.hub(listen=[f"unix://{deep}/hub.sock"])
    assert (await cluster.client("x", url=f"unix://{deep}/hub.sock")).connected


async def test_a_socket_left_behind_is_replaced_and_one_in_use_is_not(cluster, tmp_path):
    left = socket.socket(socket.AF_UNIX)
    left.bind(f"{tmp_path}/hub")
    left.close()
    await cluster.hub()
    with pytest.raises(Conflict, match="another process listens"):
        await cluster.hub()


async def test_a_hub_tells_where_it_listens_as_it_was_told(cluster, tmp_path):
    hub = await cluster.hub(listen=[f"unix://{tmp_path}/here", "tcp://127.0.0.1:0"])
    path, address = hub.addresses
    assert path == f"{tmp_path}/here"
    assert address.startswith("127.0.0.1:")


async def test_two_who_join_at_once_have_both_entered(cluster):
    await cluster.hub()
    x, y = await cluster.client("x"), await cluster.client("y")
    (await y.join("r")).on_message(lambda message: b"")
    one, other = await asyncio.gather(x.join("r"), x.join("r"))
    assert one is other
    assert "y" in other.members


async def test_leaving_twice_does_not_leave_a_newer_room(cluster):
    await cluster.hub()
    x = await cluster.client("x")
    old = await x.join("r")
    old.leave()
    new = await x.join("r")
    old.leave()
    assert await x.join("r") is new
    assert (await new.say(b"")).complete


async def test_an_answer_that_is_too_large_is_an_error_of_its_handler(cluster):
    await cluster.hub()
    x, y = await cluster.client("x"), await cluster.client("y")
    y.on_message(lambda message: b"-" * (DATA_BYTES + 1))
    with pytest.raises(Refused, match="over the 1048576 allowed"):
        await x.call("y", b"")


@pytest.mark.parametrize("name", ["", "a\nb", "é" * 128])
async def test_a_bad_name_is_a_mistake_of_who_gives_it(cluster, name):
    await cluster.hub()
    x = await cluster.client("x")
    with pytest.raises(UsageError):
        await x.join(name)
    with pytest.raises(UsageError):
        await x.state.put(name, b"")
    if name:
        with pytest.raises(UsageError):
            await connect(cluster.url(), name=name)
