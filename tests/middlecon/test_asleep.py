"""Members that are frozen: said at once, and nothing is sent to them."""

from __future__ import annotations

import pytest

from tabane.errors import Asleep
from tabane.middlecon.frames import Kind
from tabane.middlecon.receipts import Cause, parse_receipt
from tabane.middlecon.requests import error_for
from tabane.middlecon.tallies import parse_reason


@pytest.fixture
def room(brain):
    """The sender `x` and the members `y` and `z`, of whom `y` is frozen."""
    ports = {name: brain.session(name) for name in "xyz"}
    numbers = {name: brain.join(port, "r") for name, port in ports.items()}
    brain.directory.set_asleep(ports["y"].member, True)
    for port in ports.values():
        port.out = []
    return ports, numbers["x"]


def test_a_receipt_names_it_at_once(brain, take, room):
    ports, number = room
    brain.tell(ports["x"], Kind.SAY, to=number, id=1, value=1000, data=b"hi")
    assert take(ports["y"]) == []
    (copy,) = take(ports["z"])
    brain.tell(ports["z"], Kind.ACK, id=copy.id)
    (receipt,) = take(ports["x"])
    total = parse_receipt(receipt)
    assert (total.acknowledged, total.asleep, total.failed) == (["z"], ["y"], {})


def test_a_room_of_sleepers_answers_at_once(brain, take, room):
    ports, number = room
    brain.directory.set_asleep(ports["z"].member, True)
    (receipt,) = brain.tell(ports["x"], Kind.ASK, to=number, id=1, value=1000)
    assert sorted(parse_receipt(receipt).asleep) == ["y", "z"]


def test_a_frozen_sender_is_not_in_its_own_receipt(brain, take, room):
    ports, number = room
    brain.directory.set_asleep(ports["x"].member, True)
    brain.tell(ports["x"], Kind.SAY, to=number, id=1, value=1000)
    (copy,) = take(ports["z"])
    brain.tell(ports["z"], Kind.ACK, id=copy.id)
    assert parse_receipt(take(ports["x"])[0]).asleep == ["y"]


def test_a_call_is_refused_at_once(brain, take, room):
    ports, _ = room
    (frame,) = brain.tell(ports["x"], Kind.CALL, name="y", id=1, value=1000)
    reason = parse_reason(frame)
    assert reason.cause is Cause.ASLEEP
    assert isinstance(error_for(reason), Asleep)


def test_casts_to_it_are_dropped_and_counted(brain, take, room):
    ports, number = room
    brain.tell(ports["x"], Kind.CAST, to=number, data=b"tick")
    assert take(ports["y"]) == []
    assert ports["y"].dropped == 1
    assert len(take(ports["z"])) == 1


def test_one_that_is_thawed_hears_again(brain, take, room):
    ports, number = room
    brain.directory.set_asleep(ports["y"].member, False)
    brain.tell(ports["x"], Kind.SAY, to=number, id=1, value=1000)
    assert len(take(ports["y"])) == 1


def test_one_that_joins_or_leaves_while_frozen(brain, take, room):
    ports, _ = room
    other = brain.join(ports["y"], "s")
    mine = brain.join(ports["x"], "s")
    (receipt,) = brain.tell(ports["x"], Kind.SAY, to=mine, id=1, value=1000)
    assert parse_receipt(receipt).asleep == ["y"]
    brain.tell(ports["y"], Kind.LEAVE, to=other)
    frames = brain.tell(ports["x"], Kind.SAY, to=mine, id=2, value=1000)
    assert parse_receipt(frames[-1]).asleep == []
    brain.relay.close(ports["y"])
    assert all(not room.asleep for room in brain.directory.rooms.values())
