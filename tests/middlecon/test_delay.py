"""Data centers that are far apart: everything holds, and what is near does not wait for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tabane.middlecon.receipts import Cause
from tabane.testing.delay import Delay

FAR = (0.07, 0.2)
"""One way, in seconds: another continent, and a satellite."""


class Far:
    """Hubs `a1`, `a2` near each other and `b1`, `b2` as far away as `way` says."""

    def __init__(self, way: Delay, hubs: dict[str, Any]) -> None:
        self.way = way
        self.hubs = hubs


@pytest.fixture(params=FAR, ids=lambda delay_s: f"{delay_s * 1000:g} ms")
async def far(request, cluster, eventually):
    hubs = {name: await cluster.hub(name, datacenter=name[0]) for name in ("a1", "a2", "b1", "b2")}
    hubs["a1"].link("a2", cluster.url("a2"), datacenter="a")
    hubs["b1"].link("b2", cluster.url("b2"), datacenter="b")
    async with Delay(cluster.url("a1"), request.param) as way:
        hubs["a1"].expect("b1")
        hubs["b1"].link("a1", way.url, datacenter="a")
        await eventually(
            lambda: all(
                hub.peers.get(name) for hub in hubs.values() for name in hubs if name != hub.name
            )
        )
        yield Far(way, hubs)


async def room_at(cluster, hub: str, name: str, answer: bytes = b""):
    member = await cluster.client(name, hub)
    room = await member.join("r")
    room.on_message(lambda message: answer)
    return member, room


async def test_a_say_reaches_all_and_takes_one_way_there_and_back(far, cluster, eventually):
    _, room = await room_at(cluster, "a2", "x")
    for hub in ("a1", "b1", "b2"):
        await room_at(cluster, hub, f"y-{hub}", hub.encode())
    await eventually(lambda: len(room.members) == 4)
    loop = asyncio.get_running_loop()
    began = loop.time()
    replies = await room.ask(b"who?", timeout_s=5)
    took_s = loop.time() - began
    assert replies.answers == {f"y-{hub}": hub.encode() for hub in ("a1", "b1", "b2")}
    assert took_s >= 2 * far.way.delay_s


async def test_a_deadline_that_ends_on_the_way_still_tells_each_fate(far, cluster, eventually):
    """Those that are far have acknowledged in time; that they have, comes later."""
    _, room = await room_at(cluster, "a2", "x")
    await room_at(cluster, "b2", "y")
    await eventually(lambda: "y" in room.members)
    receipt = await room.say(b"hi", timeout_s=far.way.delay_s)
    assert receipt.acknowledged == ("y",) and receipt.complete


async def test_what_is_near_does_not_wait(far, cluster, eventually):
    _, room = await room_at(cluster, "a1", "x")
    await room_at(cluster, "b2", "y")
    near = await cluster.client("n", "a1")
    local = await near.join("local")
    beside = await cluster.client("m", "a2")
    (await beside.join("local")).on_message(lambda message: b"")
    await eventually(lambda: "y" in room.members and "m" in local.members)
    asking = asyncio.create_task(room.say(b"hi", timeout_s=5))
    for _ in range(20):
        assert (await local.say(b"")).acknowledged == ("m",)
    assert not asking.done()
    assert (await asking).acknowledged == ("y",)


async def test_the_order_of_one_sender_is_kept(far, cluster, eventually):
    _, room = await room_at(cluster, "a1", "x")
    member = await cluster.client("y", "b2")
    heard: list[bytes] = []
    (await member.join("r")).on_message(lambda message: heard.append(message.data))
    await eventually(lambda: "y" in room.members)
    for number in range(100):
        await room.cast(b"%d" % number)
    await room.say(b"100", timeout_s=5)
    assert heard == [b"%d" % number for number in range(101)]


async def test_a_line_that_breaks_hides_only_what_is_behind_it(far, cluster, eventually):
    _, room = await room_at(cluster, "a1", "x")
    await room_at(cluster, "a2", "near")
    _, other = await room_at(cluster, "b2", "y")
    began, go_on = asyncio.Event(), asyncio.Event()

    @other.on_message
    async def hesitate(message):
        began.set()
        await go_on.wait()

    await eventually(lambda: {"near", "y"} <= room.members.keys())
    asking = asyncio.create_task(room.say(b"hi", timeout_s=60))
    await began.wait()
    far.way.cut()
    receipt = await asking
    assert (receipt.acknowledged, receipt.unknown) == (("near",), ("y",))
    later = await room.say(b"hi", timeout_s=1)
    assert later.failed["y"].cause in (Cause.UNREACHABLE, Cause.TIMED_OUT)
    go_on.set()
    await eventually(lambda: room.members["y"].known)
    assert set((await room.say(b"hi", timeout_s=5)).acknowledged) == {"near", "y"}
