"""Slow members: their senders wait, their oldest casts go, or they do; and what is urgent."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import TimedOut
from tabane.middlecon import WhenSlow
from tabane.middlecon.backlog import Backlog
from tabane.middlecon.frames import STOP, URGENT, JoinFlag, Kind, encode_frame
from tabane.middlecon.receipts import Cause, parse_receipt
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


def test_slowness_is_told_over_links(make_brain, take):
    brain = make_brain("b", hold_bytes=HOLD)
    link, y = brain.link("a"), brain.session("y")
    number = brain.join(y, "r")
    brain.tell(link, Kind.MEMBER, to=71, name="x")
    brain.tell(link, Kind.PRESENCE, to=33, name="x", data=b"r")
    y.backlog = HOLD + 1
    assert flows(brain.tell(link, Kind.CAST, to=number, name="x")) == [(33, STOP)]
    z = brain.session("z")
    brain.join(z, "r", 0)
    y.backlog = 0
    brain.relay.flow.drained(y)
    assert flows(take(link)) == [(33, 0)]
    brain.tell(link, Kind.FLOW, to=number, flags=STOP)
    assert flows(brain.tell(z, Kind.CAST, to=number)) == [(number, STOP)]
    brain.tell(link, Kind.FLOW, to=number)
    assert flows(take(z)) == [(number, 0)]
    assert flows(take(link)) == []


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
