"""What once went wrong, and must not again."""

from __future__ import annotations

import asyncio
import logging

import msgspec
import pytest

from tabane.errors import Busy, Closed, Denied, ProtocolError
from tabane.middlecon.frames import MAGIC, OPEN, Decoder, Frame, JoinFlag, Kind, encode_frame
from tabane.middlecon.receipts import Cause, Sum, encode_receipt, parse_receipt
from tabane.middlecon.session import (
    Hello,
    Limits,
    Mode,
    Session,
    Side,
    Welcome,
    encode_hello,
    encode_welcome,
    parse_hello,
    parse_welcome,
    sniff,
)

WEB = "default/web-0123456789ab"


async def back(client):
    """Lose the session, and have it again."""
    connected = asyncio.Event()
    client.on_connected(connected.set)
    client.abort()
    await asyncio.wait_for(connected.wait(), 10)


async def test_a_room_that_is_not_allowed_any_more_locks_out_of_no_other(cluster, tmp_path, caplog):
    await cluster.hub()
    agent, path = await cluster.client("agent"), tmp_path / "web.sock"
    await agent.serve(path, name=WEB, rooms=["a", "b"])
    program = await cluster.client("p", url=f"unix://{path}")
    rooms = {name: await program.join(name) for name in "ab"}
    await agent.serve(path, name=WEB, rooms=["b"])
    await back(program)
    assert (await rooms["b"].say(b"")).acknowledged == ()
    with pytest.raises(Closed, match="not in the room a"):
        await rooms["a"].say(b"")
    with pytest.raises(Denied):
        await program.join("a")
    assert "not in a any more" in caplog.text
    await agent.serve(path, name=WEB, rooms=["a"])
    assert await program.join("a") is rooms["a"]
    assert (await rooms["a"].say(b"")).acknowledged == ()


async def test_a_limit_of_the_hub_locks_out_of_no_other_room(cluster, caplog):
    caplog.set_level(logging.CRITICAL)
    hub = await cluster.hub()
    x = await cluster.client("x")
    rooms = [await x.join(name) for name in "abc"]
    await hub.aclose()
    await cluster.hub(limits=Limits(rooms=2))
    await back(x)
    await rooms[0].cast(b"")
    await rooms[1].cast(b"")
    with pytest.raises(Closed):
        await rooms[2].cast(b"")
    with pytest.raises(Busy):
        await x.join("c")


async def test_the_reason_why_there_is_no_session_is_kept(cluster, eventually, monkeypatch):
    await cluster.hub()
    x = await cluster.client("x")

    async def restore():
        raise Denied("not for you")

    monkeypatch.setattr(x, "restore", restore)
    x.abort()
    await eventually(lambda: x.trouble == "not for you")


# What a peer tells


@pytest.mark.parametrize("links", [64, 0xFFFFFFFF])
def test_a_hub_over_more_links_than_there_may_be_is_a_breach(brain, links):
    link = brain.link("b")
    with pytest.raises(ProtocolError, match="links"):
        brain.tell(link, Kind.HUB, name="c", flags=OPEN, value=links)
    assert "c" not in brain.directory.hubs
    brain.tell(link, Kind.HUB, name="c", flags=OPEN, value=63)
    brain.tell(link, Kind.SYNCED)
    x = brain.session("x")
    brain.tell(x, Kind.SAY, to=brain.join(x, "r"), id=1, value=1000)
    assert brain.directory.height == 64


def a_hello(**fields) -> Frame:
    data = encode_hello(Hello("x", "run", **fields))[4:]
    return Frame(Kind.HELLO, data=data[20:])


@pytest.mark.parametrize(
    "fields", [{"datacenter": "d\n"}, {"datacenter": "d" * 256}, {"role": "king"}]
)
def test_a_hello_that_others_could_not_pass_on_is_a_breach(fields):
    with pytest.raises(ProtocolError):
        parse_hello(a_hello(**fields))
    assert parse_hello(a_hello(role="hub")).datacenter == ""


@pytest.mark.parametrize(
    "fields",
    [
        {"hub": "h\n"},
        {"datacenter": "d\n"},
        {"hubs": {"\0": True}},
        {"name": "a\nb"},
        {"heartbeat_s": 0.0},
        {"heartbeat_s": float("nan")},
    ],
)
def test_a_welcome_with_what_may_not_be_is_a_breach(fields):
    data = encode_welcome(Welcome(**{"hub": "h", "instance": "run"} | fields))[20:]
    with pytest.raises(ProtocolError):
        parse_welcome(Frame(Kind.WELCOME, data=data))


@pytest.mark.parametrize(
    ("first", "mode"),
    [
        (b"PROPFIND / HTTP/1.1\r\n", Mode.HTTP),
        (b"BREW /pot HTTP/1.0\n", Mode.HTTP),
        (b"\r\n\r\nGET / HTTP/1.1\r\n", Mode.HTTP),
        (b"\nBREW / HTTP/1.1\r\nHost: x\r\n", Mode.HTTP),
        (b"\r\n", Mode.TEXT),
        (b"I speak HTTP/1.1 well\n", Mode.TEXT),
        (b"hello\nGET / HTTP/1.1\n", Mode.TEXT),
    ],
)
def test_what_is_http(first, mode):
    assert sniff(first) is mode


async def test_empty_lines_do_not_hide_http_from_the_lobby(cluster):
    await cluster.hub()
    reader, writer = await asyncio.open_unix_connection(cluster.url().removeprefix("unix://"))
    for part in (b"\r\n", b"\n", b"BREW / HT", b"TP/1.1\r\nHost: x\r\n\r\n"):
        writer.write(part)
        await writer.drain()
    assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 400 ")
    writer.close()
    await writer.wait_closed()


def test_before_hello_only_little_is_taken():
    session = Session(Side.HUB)
    session.receive(MAGIC + encode_frame(Kind.HELLO, data=bytes((64 << 10) + 1))[:20])
    assert session.broken is not None
    session = Session(Side.HUB)
    assert session.receive(encode_hello(Hello("x", "run")))
    assert session.receive(encode_frame(Kind.POST, data=bytes(1 << 20)))


async def test_a_session_that_closed_in_time_leaves_no_timer(yard):
    x = yard.join("x")
    yard.wire("x").transport.write(bytes(1 << 20))
    wire = yard.wire("x")
    wire.close()
    assert not wire._linger.cancelled()
    while not wire._closed:
        x.sock.recv(1 << 20)
        yard.turn()
        await asyncio.sleep(0)
    assert wire._linger.cancelled()


# Faults of our own


async def test_a_fault_costs_the_session_it_met_and_no_other(yard, monkeypatch, caplog):
    x, y = yard.members(2)

    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setitem(yard.hub._relay._of_sessions, Kind.LEAVE, fail)
    x.tell(Kind.LEAVE)
    y.tell(Kind.PING)
    yard.turn()
    assert (Kind.ERROR, "fault") in [(frame.kind, frame.name) for frame in x.frames()]
    assert Kind.PONG in [frame.kind for frame in y.frames()]
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.setattr(yard.hub._relay, "close", fail)
    y.sock.sendall(encode_frame(99))
    yard.turn()
    assert y.is_cut()
    assert "the end of the session of m1" in caplog.text


async def test_a_fault_in_chat_costs_the_persons_connection_only(cluster, monkeypatch, eventually):
    hub = await cluster.hub(limits=Limits(silence_s=0.01))
    reader, writer = await asyncio.open_unix_connection(cluster.url().removeprefix("unix://"))
    await eventually(lambda: hub.people)
    monkeypatch.setattr(hub._door._lobby, "receive", lambda *_: 1 / 0)
    writer.write(b"hi\n")
    await asyncio.wait_for(reader.read(), 10)
    assert await cluster.client("x")
    writer.close()
    await writer.wait_closed()


# What is said to those who do not read


@pytest.mark.parametrize("over_link", [False, True])
def test_posts_to_one_that_is_asleep_go_nowhere(brain, take, over_link):
    y = brain.session("y")
    brain.directory.set_asleep(y.member, True)
    if over_link:
        x = brain.link("b")
        brain.tell(x, Kind.MEMBER, name="x", to=5)
        fields = {"to": y.member.number, "name": "x"}
    else:
        x, fields = brain.session("x"), {"name": "y"}
    take(y)
    brain.tell(x, Kind.POST, data=b"hi", **fields)
    assert (take(y), y.dropped) == ([], 1)
    brain.directory.set_asleep(y.member, False)
    brain.tell(x, Kind.POST, data=b"hi", **fields)
    assert (len(take(y)), y.dropped) == (1, 1)


def test_statistics_fit_into_a_frame(brain):
    """Names of the greatest length, and numbers, too."""
    x = brain.session("x")
    for number in range(1_000):
        port = brain.session(f"{number:0250}")
        port.dropped = 1 << 40
        brain.join(port, f"{number:0255}", JoinFlag.MEMBER)
        brain.link(f"hub-{number:0250}").backlog = 1 << 40
    for number in range(3):
        brain.join(brain.session(f"y{number}"), "largest", JoinFlag.MEMBER)
    (frame,) = [frame for frame in brain.tell(x, Kind.STATS, id=1) if frame.kind == Kind.ACK]
    assert len(frame.data) < 512 << 10
    stats = msgspec.msgpack.decode(frame.data)
    assert stats["totals"] == {"rooms": 1_001, "links": 1_000, "dropped": 1_000 << 40}
    assert next(iter(stats["rooms"].items())) == ("largest", 3)
    assert min(len(stats[what]) for what in ("rooms", "links", "dropped")) > 400
    assert stats["messages"] == dict.fromkeys(stats["rooms"], 0)


def publish(yard, count: int, of_each: int) -> None:
    """Members with so many values of 64 KiB each."""
    for member in yard.members(count):
        for key in range(of_each):
            member.tell(Kind.STATE, id=1, value=2, data=b"%02d" % key + bytes(65_536))
            yard.turn()
        member.read()


def read_all(yard, raw) -> list[Frame]:
    frames = raw.frames()
    while not any(frame.kind == Kind.SYNCED for frame in frames):
        yard.turn()
        frames += raw.frames()
    return frames


async def test_a_snapshot_over_the_limit_of_a_queue_cuts_nobody_off(yard):
    publish(yard, 6, 50)
    joiner, speaker = yard.dial(), yard.join("s", 0)
    joiner.open("joiner")
    joiner.tell(Kind.JOIN, flags=JoinFlag.MEMBER | JoinFlag.WATCH, id=1, name="room")
    yard.turn()
    yard.turn()
    wire = yard.wire("joiner")
    assert wire.port.backlog > 2 * yard.hub.limits.queue_bytes
    speaker.tell(Kind.POST, name="joiner", data=b"hi")
    joiner.tell(Kind.JOIN, flags=JoinFlag.WATCH, id=2, name="other")
    yard.turn()
    for _ in range(3):
        wire.check()
    frames = read_all(yard, joiner)
    yard.turn()
    frames += joiner.frames()
    kinds = [frame.kind for frame in frames]
    assert (kinds.count(Kind.STATE), kinds.count(Kind.POST)) == (300, 1)
    assert [frame.name for frame in frames if frame.kind == Kind.NACK] == ["busy"]
    assert (wire.open, wire.congested, wire.port.allowed) == (True, False, 0)


async def test_who_pings_and_never_reads_is_cut_off(yard):
    deaf, speaker = yard.join("deaf"), yard.join("s", 0)
    for _ in range(100):
        speaker.tell(Kind.POST, name="deaf", data=bytes(100_000))
        yard.turn()
    wire = yard.wire("deaf")
    for _ in range(3):
        wire.check()
        deaf.tell(Kind.PING)
        yard.turn()
    assert wire.open
    wire.check()
    assert not wire.open
    assert "deaf" not in yard.hub.members


async def test_who_reads_slowly_and_sends_nothing_is_kept(yard):
    slow, speaker = yard.join("slow"), yard.join("s", 0)
    for _ in range(100):
        speaker.tell(Kind.POST, name="slow", data=bytes(100_000))
        yard.turn()
    wire = yard.wire("slow")
    for _ in range(20):
        wire.check()
        slow.sock.recv(200_000)
        yard.turn()
    assert wire.open


def test_answers_for_one_that_does_not_read_are_not_sent(make_brain, take):
    brain = make_brain(queue_bytes=10)
    x, y, link = brain.session("x"), brain.session("y"), brain.link("b")
    number = brain.join(x, "r")
    brain.join(y, "r", JoinFlag.MEMBER)
    for name in ("z", "w"):
        brain.tell(link, Kind.MEMBER, name=name, to=5)
        brain.tell(link, Kind.PRESENCE, name=name, to=6, data=b"r")
    for port in (x, y, link):
        take(port)
    brain.tell(x, Kind.ASK, to=number, id=1, value=1000)
    (copy,), (other,) = take(y), take(link)
    brain.tell(link, Kind.ANSWER, id=other.id, name="w", data=b"heard")
    x.backlog = 11
    brain.tell(y, Kind.ACK, id=copy.id, data=b"answer")
    brain.tell(link, Kind.ANSWER, id=other.id, name="z", data=b"answer")
    for part in encode_receipt(other.id, Sum(["z", "w"], {}, [], [])):
        frame = parse_one(part)
        brain.relay.receive(link, frame, 0.0)
    frames = take(x)
    assert [frame.name for frame in frames if frame.kind == Kind.ANSWER] == ["w"]
    total = parse_receipt(frames[-1])
    assert total.acknowledged == ["w"]
    assert {name: why.cause for name, why in total.failed.items()} == {
        "y": Cause.OVERLOADED,
        "z": Cause.OVERLOADED,
    }


def parse_one(data: bytes) -> Frame:
    (frame,) = Decoder().feed(data)
    return frame
