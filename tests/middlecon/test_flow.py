"""Slow members: their senders wait, their oldest casts go, or they do; and what is urgent."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import Closed, TimedOut
from tabane.middlecon import WhenSlow
from tabane.middlecon.backlog import Backlog
from tabane.middlecon.frames import (
    CHANGES,
    DATA_BYTES,
    STOP,
    URGENT,
    Change,
    JoinFlag,
    Kind,
    encode_frame,
)
from tabane.middlecon.ports import LinkPort
from tabane.middlecon.receipts import Cause, Reason, Sum, parse_receipt
from tabane.middlecon.session import Limits

HOLD, FULL = 100, 1000


@pytest.fixture
def slow(make_brain):
    """The speaker `x`, and `y`, for whom more waits than it should."""
    brain = make_brain(hold_bytes=HOLD, queue_bytes=FULL)
    x, y = brain.session("x"), brain.session("y")
    number = brain.join(x, "r")
    brain.join(y, "r")
    x.out = []
    y.backlog = HOLD + 1
    return brain, x, y, number


def flows(frames):
    return [(frame.to, frame.flags) for frame in frames if frame.kind == Kind.FLOW]


def test_speakers_wait_and_go_on(slow, take):
    brain, x, y, number = slow
    assert flows(brain.tell(x, Kind.CAST, to=number)) == [(number, STOP)]
    assert flows(brain.tell(x, Kind.CAST, to=number)) == []
    assert len([f for f in take(y) if f.kind == Kind.CAST]) == 2
    brain.relay.flow.drained(y)
    assert flows(take(x)) == [(number, 0)]


def test_one_who_speaks_later_waits_too(slow, take):
    brain, x, _, number = slow
    brain.tell(x, Kind.CAST, to=number)
    z = brain.session("z")
    brain.join(z, "r")
    assert flows(brain.tell(z, Kind.CAST, to=number)) == [(number, STOP)]


def test_the_end_of_the_slow_one_lets_all_go_on(slow, take):
    brain, x, y, number = slow
    brain.tell(x, Kind.CAST, to=number)
    brain.relay.close(y)
    assert flows(take(x)) == [(number, 0)]


def test_two_slow_ones_are_both_waited_for(slow, take):
    brain, x, y, number = slow
    z = brain.session("z")
    brain.join(z, "r")
    z.backlog = HOLD + 1
    brain.tell(x, Kind.CAST, to=number)
    brain.relay.flow.drained(y)
    assert (number, 0) not in flows(take(x))
    brain.relay.flow.drained(z)
    assert (number, 0) in flows(take(x))


def test_who_does_not_wait_meets_the_limit(slow, take):
    brain, x, y, number = slow
    y.backlog = FULL + 1
    brain.tell(x, Kind.CAST, to=number)
    assert y.dropped == 1
    (receipt,) = [
        f for f in brain.tell(x, Kind.SAY, to=number, id=1, value=9) if f.kind == Kind.RECEIPT
    ]
    assert parse_receipt(receipt).failed["y"].cause is Cause.OVERLOADED


def test_oldest_casts_are_dropped_for_who_wants_it(slow, take):
    brain, x, y, number = slow
    brain.join(y, "r", JoinFlag.MEMBER | JoinFlag.DROP_OLDEST)
    y.queue, y.backlog = Backlog(), FULL + 1
    y.queue.put(encode_frame(Kind.SAY, data=b"kept"))
    y.queue.put(encode_frame(Kind.CAST, data=b"old"))
    assert flows(brain.tell(x, Kind.CAST, to=number, data=b"new")) == []
    assert [f.data for f in take(y) if f.kind == Kind.CAST] == [b"new"]
    assert b"old" not in y.queue.take(10_000)
    assert y.dropped == 1


def test_one_that_wants_it_is_cut_off(slow):
    brain, x, y, number = slow
    brain.join(y, "r", JoinFlag.MEMBER | JoinFlag.DISCONNECT)
    y.backlog = FULL + 1
    brain.tell(x, Kind.CAST, to=number)
    assert [port for port, _ in brain.directory.cuts] == [y]


def told_links(frames):
    return [(frame.name, frame.flags) for frame in frames if frame.kind == Kind.FLOW]


@pytest.fixture
def behind(make_brain):
    """The speaker `x` behind a link, who is no member, and `y` here, who is slow."""
    brain = make_brain("b", hold_bytes=HOLD, queue_bytes=FULL)
    link, y = brain.link("a"), brain.session("y")
    number = brain.join(y, "r")
    brain.tell(link, Kind.MEMBER, to=71, name="x")
    y.backlog = HOLD + 1
    return brain, link, y, number


def test_slowness_is_told_over_links(behind, take):
    brain, link, y, number = behind
    assert told_links(brain.tell(link, Kind.CAST, to=number, name="x")) == [("r", STOP)]
    y.backlog = 0
    brain.relay.flow.drained(y)
    assert told_links(take(link)) == [("r", 0)]


def test_slowness_behind_a_link_holds_the_speakers_here(behind, take):
    brain, link, y, number = behind
    z = brain.session("z")
    brain.join(z, "r", 0)
    y.backlog = 0
    brain.tell(link, Kind.FLOW, name="r", flags=STOP)
    assert flows(brain.tell(z, Kind.CAST, to=number)) == [(number, STOP)]
    brain.relay.flow.drained(link)
    assert flows(take(z)) == []
    brain.tell(link, Kind.FLOW, name="r")
    assert flows(take(z)) == [(number, 0)]
    assert told_links(take(link)) == []


@pytest.mark.parametrize(
    "end",
    [
        lambda brain, link: brain.tell(link, Kind.FLOW, name="r"),
        lambda brain, link: brain.relay.close(link),
    ],
)
def test_who_waits_for_a_link_goes_on_when_its_last_member_left(behind, take, end):
    brain, link, y, number = behind
    brain.tell(link, Kind.PRESENCE, to=33, name="x", data=b"r")
    z = brain.session("z")
    brain.join(z, "r", 0)
    y.backlog = 0
    brain.tell(link, Kind.FLOW, name="r", flags=STOP)
    assert flows(brain.tell(z, Kind.CAST, to=number)) == [(number, STOP)]
    brain.tell(link, Kind.PRESENCE, to=33, name="x", data=b"r", flags=CHANGES.index(Change.LEFT))
    end(brain, link)
    assert (number, 0) in flows(take(z))
    assert not any(isinstance(port, LinkPort) for port in brain.directory.rooms["r"].slow)


def test_a_slow_link_fails_all_behind_it_and_stays(behind, take):
    brain, link, y, number = behind
    brain.tell(link, Kind.PRESENCE, to=33, name="x", data=b"r")
    z = brain.session("z")
    brain.join(z, "r", 0)
    y.backlog, link.backlog = 0, FULL + 1
    brain.tell(z, Kind.SAY, to=number, id=1, value=9)
    (copy,) = [frame for frame in take(y) if frame.kind == Kind.SAY]
    brain.tell(y, Kind.ACK, id=copy.id)
    (receipt,) = [frame for frame in take(z) if frame.kind == Kind.RECEIPT]
    assert parse_receipt(receipt).failed["x"].cause is Cause.OVERLOADED
    assert brain.directory.cuts == []


@pytest.mark.parametrize(
    "silence",
    [
        lambda brain, y, number: brain.tell(y, Kind.LEAVE, to=number),
        lambda brain, y, number: brain.directory.set_asleep(y.member, True),
        lambda brain, y, number: brain.join(y, "r", JoinFlag.WATCH),
        lambda brain, y, number: brain.join(y, "r", JoinFlag.MEMBER | JoinFlag.DROP_OLDEST),
    ],
)
def test_nobody_waits_for_one_that_is_not_to_hear(slow, take, silence):
    brain, x, y, number = slow
    brain.tell(x, Kind.CAST, to=number)
    silence(brain, y, number)
    assert flows(take(x)) == [(number, 0)]


def test_urgent_messages_have_a_limit_too(slow, take):
    brain, x, y, number = slow
    y.backlog = FULL + 1
    brain.tell(x, Kind.CAST, to=number, flags=URGENT)
    frames = brain.tell(x, Kind.SAY, to=number, id=1, value=9, flags=URGENT)
    (receipt,) = [frame for frame in frames if frame.kind == Kind.RECEIPT]
    assert parse_receipt(receipt).failed["y"].cause is Cause.OVERLOADED
    assert (y.urgent, y.dropped) == ([], 1)


def test_a_member_has_one_fate_whatever_two_hubs_say():
    gone, late = Reason(Cause.UNREACHABLE), Reason(Cause.TIMED_OUT)
    failed = {"a": gone, "b": gone, "c": late, "d": gone, "e": late, "s": gone, "t": late}
    total = Sum(["a", "e"], failed, ["a", "b", "c", "b"], ["s", "t"])
    total.settle()
    certain = dict.fromkeys("cet", late)
    assert total == Sum(["a"], {**certain, "d": gone}, ["b"], ["s"])


def test_an_urgent_message_leaves_first_and_in_order(brain):
    x, y = brain.session("x"), brain.session("y")
    for number in range(3):
        brain.tell(x, Kind.POST, name="y", data=b"%d" % number)
        brain.tell(x, Kind.POST, name="y", flags=URGENT, data=b"urgent %d" % number)
    sent = b"".join(y.urgent + y.out)
    places = [sent.index(text) for text in (b"urgent 0", b"urgent 1", b"urgent 2")]
    assert places == sorted(places) and places[-1] < len(b"".join(y.urgent))


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=40))), st.integers(1, 100))
def test_a_backlog_loses_nothing_and_keeps_both_orders(puts, limit):
    backlog = Backlog()
    frames = {True: [], False: []}
    for number, (urgent, data) in enumerate(puts):
        frame = encode_frame(Kind.POST, id=number, data=data)
        frames[urgent].append(frame)
        (backlog.put_urgent if urgent else backlog.put)(frame)
    assert backlog.bytes == sum(len(frame) for kind in frames.values() for frame in kind)
    pieces = []
    while backlog.bytes:
        pieces.append(backlog.take(limit))
        assert pieces[-1]
    assert b"".join(pieces) == b"".join(frames[True] + frames[False])


async def slow_pair(cluster, **limits):
    """The speaker, and a member over a raw connection that does not read."""
    await cluster.hub(limits=Limits(hold_bytes=1 << 16, **limits))
    me = await cluster.client("me")
    other = await cluster.client("other")
    room = await me.join("r", watch=False)
    return me, other, room


async def test_a_cast_waits_until_a_slow_member_reads_again(cluster, eventually):
    _, other, room = await slow_pair(cluster)
    heard = []
    its = await other.join("r")
    its.on_message(lambda message: heard.append(message.data[:1]))
    other._connection._wire.transport.pause_reading()

    async def speak():
        for number in range(200):
            await room.cast(bytes([number]) * 60_000)

    speaking = asyncio.create_task(speak())
    await eventually(lambda: room._may_speak is not None)
    with pytest.raises(TimedOut, match="too slow"):
        await room.say(b"", timeout_s=0.01)
    assert not speaking.done()
    other._connection._wire.transport.resume_reading()
    await speaking
    await eventually(lambda: len(heard) == 200)
    assert heard == [bytes([number]) for number in range(200)]


async def test_an_urgent_message_overtakes_what_waits(cluster, eventually):
    me, other, room = await slow_pair(cluster)
    heard = []
    its = await other.join("r")
    its.on_message(lambda message: heard.append(len(message.data)))
    other.on_message(lambda message: heard.append(message.data))
    other._connection._wire.transport.pause_reading()

    async def speak():
        for _ in range(100):
            await room.cast(b"-" * 100_000)

    speaking = asyncio.create_task(speak())
    await eventually(lambda: room._may_speak is not None)
    me.send_nowait("other", b"now", urgent=True)
    assert (await me.hub_stats())["backlog_bytes"] > 0
    other._connection._wire.transport.resume_reading()
    await speaking
    await eventually(lambda: len(heard) == 101)
    assert heard.index(b"now") < 100


async def test_a_member_that_asked_for_it_loses_its_oldest_casts(cluster, eventually):
    me, other, room = await slow_pair(cluster, queue_bytes=1 << 18)
    its = await other.join("r", when_slow=WhenSlow.DROP_OLDEST)
    heard = []
    its.on_message(lambda message: heard.append(message.data[0]))
    other._connection._wire.transport.pause_reading()
    for number in range(100):
        await room.cast(bytes([number]) * 50_000)
    assert (await me.hub_stats())["dropped"] == {"other": pytest.approx(80, abs=20)}
    other._connection._wire.transport.resume_reading()
    await eventually(lambda: heard and heard[-1] == 99)
    assert heard == sorted(heard) and len(heard) < 100


@pytest.mark.parametrize("ending", ["leave", "close", "hub"])
async def test_who_waits_to_speak_is_told_when_there_is_nothing_to_wait_for(
    cluster, eventually, ending
):
    hub = await cluster.hub(limits=Limits(hold_bytes=1 << 16))
    me, other = await cluster.client("me"), await cluster.client("other")
    room = await me.join("r", watch=False)
    (await other.join("r")).on_message(lambda message: None)
    other._connection._wire.transport.pause_reading()

    async def speak():
        while True:
            await room.cast(b"-" * 60_000)

    speaking = asyncio.create_task(speak())
    await eventually(lambda: room._may_speak is not None)
    if ending == "leave":
        room.leave()
    elif ending == "close":
        await me.aclose()
    else:
        await hub.aclose()
    with pytest.raises(Closed):
        await speaking


async def test_one_who_says_much_at_once_waits_and_keeps_its_session(cluster):
    await cluster.hub()
    me, other = await cluster.client("me"), await cluster.client("other")
    room = await me.join("r", watch=False)
    (await other.join("r")).on_message(lambda message: b"")
    receipts = await asyncio.gather(*(room.say(b"-" * DATA_BYTES, timeout_s=60) for _ in range(40)))
    assert all(receipt.complete for receipt in receipts)
