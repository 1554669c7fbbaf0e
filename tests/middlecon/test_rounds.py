"""The rounds of a hub, in Python and in C: the same, whatever comes over the sockets together."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest

from tabane.middlecon.frames import URGENT, Decoder, Kind, encode_frame
from tabane.middlecon.receipts import Cause
from tabane.middlecon.tallies import Tally
from tabane.middlecon.wire import PING, Wire

MANY = 60


def test_each_is_told_once_and_counted_once(yard) -> None:
    speaker, members = yard.join("s", 0), yard.members(MANY)
    for text in (b"one", b"two", b"three"):
        yard.say(speaker, data=text)
        for member in members:
            copy = member.copy()
            assert (copy.name, copy.data) == ("s", text)
            member.tell(Kind.ACK, id=copy.id)
        assert speaker.frames() == []
        yard.turn()
        (receipt,) = speaker.receipts()
        assert sorted(receipt.acknowledged) == sorted(f"m{n}" for n in range(MANY))
        assert not (receipt.failed or receipt.unknown)
    assert not yard.hub._relay.pending


def test_an_acknowledgement_may_come_byte_by_byte(yard) -> None:
    speaker, (a, b) = yard.join("s", 0), yard.members(2)
    yard.say(speaker)
    ack = encode_frame(Kind.ACK, id=a.copy().id)
    b.tell(Kind.ACK, id=b.copy().id)
    for byte in ack:
        assert speaker.receipts() == []
        a.sock.sendall(bytes([byte]))
        yard.turn()
    (receipt,) = speaker.receipts()
    assert sorted(receipt.acknowledged) == ["m0", "m1"]


@pytest.mark.parametrize("cut", [1, 19, 21, 30])
def test_an_acknowledgement_may_come_with_other_frames(yard, cut: int) -> None:
    speaker, (a,) = yard.join("s", 0), yard.members(1)
    yard.say(speaker)
    data = encode_frame(Kind.ACK, id=a.copy().id) + encode_frame(Kind.PING)
    for part in (data[:cut], data[cut:]):
        a.sock.sendall(part)
        yard.turn()
    assert [f.kind for f in a.frames()] == [Kind.PONG]
    assert speaker.receipts()[0].acknowledged == ["m0"]


def test_a_chunk_that_only_looks_like_an_acknowledgement(yard) -> None:
    """It is in the middle of another frame's data."""
    speaker, (a, b) = yard.join("s", 0), yard.members(2)
    yard.say(speaker)
    b.tell(Kind.ACK, id=b.copy().id)
    inner = encode_frame(Kind.ACK, id=a.copy().id)
    whole = encode_frame(Kind.CAST, to=yard.room, data=inner)
    for part in (whole[: -len(inner)], inner):
        a.sock.sendall(part)
        yard.turn()
    assert [(f.kind, f.data) for f in b.frames()] == [(Kind.CAST, inner)]
    assert speaker.receipts() == []


def test_two_messages_are_counted_apart(yard) -> None:
    speaker, (a, b) = yard.join("s", 0), yard.members(2)
    yard.say(speaker)
    yard.say(speaker)
    ids = [f.id for f in a.frames()]
    b.tell(Kind.ACK, id=ids[1])
    a.sock.sendall(b"".join(encode_frame(Kind.ACK, id=id) for id in ids))
    yard.turn()
    (receipt,) = speaker.receipts()
    assert sorted(receipt.acknowledged) == ["m0", "m1"]
    b.tell(Kind.ACK, id=ids[0])
    yard.turn()
    assert len(speaker.receipts()) == 1


def test_an_answer_to_who_asks(yard) -> None:
    speaker, (a, b) = yard.join("s", 0), yard.members(2)
    yard.say(speaker, Kind.ASK)
    a.tell(Kind.ACK, id=a.copy().id)
    b.tell(Kind.ACK, id=b.copy().id, data=b"yes")
    yard.turn()
    frames = speaker.frames()
    answers = {f.name: f.data for f in frames if f.kind == Kind.ANSWER}
    assert answers == {"m0": b"", "m1": b"yes"}
    assert frames[-1].kind == Kind.RECEIPT


def test_who_acknowledges_twice_is_cut_off(yard) -> None:
    speaker, (a, b) = yard.join("s", 0), yard.members(2)
    yard.say(speaker)
    id = a.copy().id
    for _ in range(2):
        a.tell(Kind.ACK, id=id)
        yard.turn()
    assert a.is_cut()
    b.tell(Kind.ACK, id=b.copy().id)
    yard.turn()
    assert sorted(speaker.receipts()[0].acknowledged) == ["m0", "m1"]


def test_who_acknowledges_for_others_is_cut_off(yard) -> None:
    speaker, (a, b) = yard.join("s", 0), yard.members(2)
    speaker.tell(Kind.SEND, id=4, value=60_000, name="m0")
    yard.turn()
    id = a.copy().id
    b.tell(Kind.ACK, id=id)
    speaker.tell(Kind.ACK, id=id + 1)
    yard.turn()
    assert b.is_cut()
    a.tell(Kind.ACK, id=id)
    yard.turn()
    assert [(f.kind, f.id) for f in speaker.frames()] == [(Kind.ACK, 4)]


def test_the_others_of_the_offenders_batch_are_served(yard) -> None:
    speaker, members = yard.join("s", 0), yard.members(MANY)
    yard.say(speaker)
    ids = {member.copy().id for member in members}
    (id,) = ids
    members[0].tell(Kind.ACK, id=id)
    yard.turn()
    for member in members:
        member.tell(Kind.ACK, id=id)
    yard.turn()
    assert members[0].is_cut()
    assert len(speaker.receipts()[0].acknowledged) == MANY


@pytest.mark.parametrize("late", [0, 1])
async def test_who_vanishes_has_failed(yard, late: int) -> None:
    """Before it is told, and after."""
    speaker, members = yard.join("s", 0), yard.members(4)
    if late:
        yard.say(speaker)
    gone = members[1]
    gone.sock.close()
    if not late:
        yard.say(speaker)
    for member in (members[0], members[2], members[3]):
        member.tell(Kind.ACK, id=member.copy().id)
    yard.turn()
    await asyncio.sleep(0)
    yard.turn()
    (receipt,) = speaker.receipts()
    assert sorted(receipt.acknowledged) == ["m0", "m2", "m3"]
    assert {name: reason.cause for name, reason in receipt.failed.items()} == {"m1": Cause.CLOSED}


async def test_what_came_before_the_end_counts(yard) -> None:
    speaker, (a, b) = yard.join("s", 0), yard.members(2)
    yard.say(speaker)
    a.tell(Kind.ACK, id=a.copy().id)
    a.sock.close()
    b.tell(Kind.ACK, id=b.copy().id)
    yard.turn()
    await asyncio.sleep(0)
    (receipt,) = speaker.receipts()
    assert sorted(receipt.acknowledged) == ["m0", "m1"]


async def test_the_end_of_what_comes_is_the_end(yard) -> None:
    (a,) = yard.members(1)
    a.sock.shutdown(socket.SHUT_WR)
    yard.turn()
    await asyncio.sleep(0)
    assert not yard.hub.members
    assert a.read() == b""
    assert a.sock.recv(1) == b""


async def test_a_connection_that_is_reset(yard) -> None:
    tcp = yard.hub.addresses[1]
    speaker = yard.join("s", 0)
    a, b = (yard.join(name, address=tcp) for name in ("a", "b"))
    yard.say(speaker)
    b.tell(Kind.ACK, id=b.copy().id)
    a.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    a.sock.close()
    yard.turn()
    await asyncio.sleep(0)
    yard.turn()
    (receipt,) = speaker.receipts()
    assert (receipt.acknowledged, list(receipt.failed)) == (["b"], ["a"])


def test_a_descriptor_that_is_somebody_elses_within_a_round(yard) -> None:
    old = yard.join("old")
    speaker = yard.join("s", 0)
    fd = yard.wire("old").transport.get_extra_info("socket").fileno()
    successor = yard.dial()
    yard.turn()
    successor.open("old")  # the same name and instance: it takes the place of the one before
    new = yard.dial()  # and this one its descriptor,
    old.tell(Kind.ACK, id=77)  # for which something is in the same round
    yard.turn()
    assert yard.hub._reactor is not None
    assert yard.hub._reactor._transports[fd].sock.getpeername() is not None
    new.open("new")
    yard.turn()
    assert yard.wire("new").transport.get_extra_info("socket").fileno() == fd
    assert yard.wire("old").transport.get_extra_info("socket").fileno() != fd
    for raw in (new, successor):
        assert next(f.kind for f in raw.frames()) == Kind.WELCOME
    yard.say(speaker)
    assert yard.wire("new").open


def test_what_is_urgent_goes_first(yard) -> None:
    speaker, members = yard.join("s", 0), yard.members(3)
    texts = [(b"1", 0), (b"2", 0), (b"3", URGENT), (b"4", 0)]
    speaker.sock.sendall(
        b"".join(encode_frame(Kind.CAST, flags=f, to=yard.room, data=d) for d, f in texts)
    )
    yard.turn()
    for member in members:
        assert [frame.data for frame in member.frames()] == [b"3", b"1", b"2", b"4"]
    yard.say(speaker, flags=URGENT)
    for member in members:
        member.tell(Kind.ACK, id=member.copy().id)
    yard.turn()
    assert len(speaker.receipts()[0].acknowledged) == 3


@pytest.mark.parametrize("tcp", [False, True])
def test_who_reads_late_gets_all_in_order(yard, tcp: bool) -> None:
    """Its sockets' buffers are full in the middle of a frame; nobody else waits for it."""
    address = yard.hub.addresses[1] if tcp else None
    speaker, late, quick = yard.join("s", 0), yard.join("l", address=address), yard.join("q")
    sent, of_quick, of_late = [], b"", b""
    for number in range(60):
        sent.append(number.to_bytes(4, "big") * 25_000)
        speaker.tell(Kind.CAST, to=yard.room, data=sent[-1])
        yard.turn()
        of_quick += quick.read()
    assert [f.data for f in Decoder().feed(of_quick)] == sent
    assert yard.wire("l").congested
    assert yard.hub._relay.stats()["backlog_bytes"]
    for _ in range(1000):
        if len(of_late) == len(of_quick):
            break
        of_late += late.read()
        yard.turn()
    assert [f.data for f in Decoder().feed(of_late)] == sent
    assert not yard.wire("l").congested
    yard.say(speaker)
    assert late.copy().data == b""


def fill(wire: Wire) -> bytes:
    """Write until the kernel takes no more; what was written."""
    written = b""
    while not wire.transport.get_write_buffer_size():
        written += bytes([len(written) % 251]) * 999
        wire.transport.write(written[-999:])
    return written


async def test_nothing_overtakes_what_the_kernel_has_not_taken(yard) -> None:
    """Even when it would take something again, which is not known yet."""
    (a,) = yard.members(1)
    wire = yard.wire("m0")
    written, read = fill(wire), a.read()
    wire.port.send(b"the next")
    yard.hub._flusher.flush()
    yard.turn()
    assert read + a.read() == written + b"the next"


def test_who_never_reads_is_said_to_be_overloaded(yard) -> None:
    speaker, _, quick = yard.join("s", 0), yard.join("never"), yard.join("q")
    while yard.wire("never").port.backlog <= yard.hub.limits.queue_bytes:
        speaker.tell(Kind.CAST, to=yard.room, data=bytes(1 << 16))
        yard.turn()
        quick.frames()
    yard.say(speaker)
    quick.tell(Kind.ACK, id=quick.copy().id)
    yard.turn()
    (receipt,) = speaker.receipts()
    assert receipt.acknowledged == ["q"]
    assert receipt.failed["never"].cause == Cause.OVERLOADED


def test_an_acknowledgement_is_a_sign_of_life(yard) -> None:
    speaker, (a,) = yard.join("s", 0), yard.members(1)
    yard.say(speaker)
    yard.wire("m0")._quiet = 3
    a.tell(Kind.ACK, id=a.copy().id)
    yard.turn()
    assert yard.wire("m0")._quiet == 0


@pytest.mark.parametrize("times", [1, 2])
async def test_a_fault_of_ours_costs_who_met_it_and_at_most_one_receipt(
    yard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, times: int
) -> None:
    """An acknowledgement meets it, and, the second time, the end of that session."""
    speaker, members = yard.join("s", 0), yard.members(3)
    yard.say(speaker)
    maybe_end, faults = Tally.maybe_end, [RuntimeError("a bug")] * times

    def fail(tally: Tally) -> None:
        if faults:
            raise faults.pop()
        maybe_end(tally)

    monkeypatch.setattr(Tally, "maybe_end", fail)
    for member in members:
        member.tell(Kind.ACK, id=member.copy().id)
    yard.turn()
    assert faults == [] and "a bug" in caplog.text
    frames = [member.frames() for member in members]
    cut = [n for n in range(3) if (Kind.ERROR, "fault") in [(f.kind, f.name) for f in frames[n]]]
    assert len(cut) == 1 and yard.hub._relay.pending == {}
    names = [sorted(receipt.acknowledged) for receipt in speaker.receipts()]
    assert names == ([["m0", "m1", "m2"]] if times == 1 else [])
    yard.say(speaker)
    others = [member for n, member in enumerate(members) if n not in cut]
    for member in others:
        member.tell(Kind.ACK, id=member.copy().id)
    yard.turn()
    assert len(speaker.receipts()[0].acknowledged) == 2


async def test_a_fault_in_what_is_sent_costs_one_session_only(
    yard, caplog: pytest.LogCaptureFixture
) -> None:
    speaker, members = yard.join("s", 0), yard.members(3)
    yard.say(speaker)
    ids = [member.copy().id for member in members]
    for name in ("m0", "m1", "m2"):
        yard.wire(name).port.send(PING)
    yard.wire("m1").port.out.append(None)
    yard.hub._flusher.flush()
    assert "the session of m1 is cut off" in caplog.text
    for number in (0, 2):
        assert Kind.PING in [frame.kind for frame in members[number].frames()]
        members[number].tell(Kind.ACK, id=ids[number])
    yard.turn()
    (receipt,) = speaker.receipts()
    assert sorted(receipt.acknowledged) == ["m0", "m2"] and list(receipt.failed) == ["m1"]
    members[1].frames()
    assert members[1].sock.recv(1) == b""


async def test_wires_on_other_transports_are_left_to_python(yard) -> None:
    """A hub's links run on the loop's own transports, and share its flusher."""
    wires = []

    def make() -> Wire:
        wire = yard.hub._make_wire()
        wire._on_made = None
        wires.append(wire)
        return wire

    ours, theirs = socket.socketpair()
    with theirs:
        transport, _ = await asyncio.get_running_loop().create_connection(make, sock=ours)
        wires[0].port.send(b"one")
        wires[0].port.send_first(b"two")
        yard.hub._flusher.flush()
        assert theirs.recv(10) == b"twoone"
        wires[0].on_lost = lambda wire, error: None
        transport.abort()
        await wires[0].wait_closed()


async def test_a_closed_wire_gets_nothing(yard) -> None:
    yard.join("a")
    wire = yard.wire("a")
    wire.port.send(b"never seen")
    wire.open = False
    yard.hub._flusher.flush()
    assert wire.port.out == []
    assert b"never seen" not in yard.all[0].read()
    wire.open = True
