"""Membership, state and replicas, decided without IO."""

from __future__ import annotations

import pytest

from tabane.errors import ProtocolError
from tabane.middlecon.directory import RETURN_S
from tabane.middlecon.frames import CHANGES, GONE, OPEN, Change, JoinFlag, Kind


def presences(frames):
    return [(f.name, CHANGES[f.flags]) for f in frames if f.kind == Kind.PRESENCE]


def states(frames):
    return [
        (f.name, f.data[: f.value], None if f.flags & GONE else f.data[f.value :])
        for f in frames
        if f.kind == Kind.STATE
    ]


def test_a_joiner_gets_its_number_then_a_snapshot_then_synced(brain, take):
    x, y = brain.session("x"), brain.session("y")
    brain.join(x, "r")
    brain.tell(x, Kind.STATE, value=4, data=b"load7")
    frames = brain.tell(y, Kind.JOIN, name="r", id=5, flags=JoinFlag.MEMBER | JoinFlag.WATCH)
    assert [f.kind for f in frames] == [
        Kind.JOIN,
        Kind.PRESENCE,
        Kind.STATE,
        Kind.PRESENCE,
        Kind.SYNCED,
    ]
    assert presences(frames) == [("x", Change.JOINED), ("y", Change.JOINED)]
    assert states(frames) == [("x", b"load", b"7")]
    assert (frames[-1].id, frames[-1].value) == (5, 2) and frames[0].to == frames[-1].to
    assert presences(take(x)) == [("y", Change.JOINED)]


def test_who_only_speaks_or_watches_is_no_member(brain, take):
    x, y = brain.session("x"), brain.session("y")
    brain.join(x, "r")
    number = brain.join(y, "r", JoinFlag.WATCH)
    assert take(x) == []
    brain.tell(x, Kind.LEAVE, to=number)
    assert presences(take(y)) == [("x", Change.LEFT)]
    brain.tell(y, Kind.LEAVE, to=number)
    assert brain.directory.rooms == {} and brain.directory.numbered == {}


def test_joining_again_changes_what_one_is(brain, take):
    x, y = brain.session("x"), brain.session("y")
    brain.join(x, "r")
    brain.join(y, "r")
    take(x)
    brain.join(y, "r", JoinFlag.WATCH)
    assert presences(take(x)) == [("y", Change.LEFT)]


def test_room_numbers_are_never_given_twice(brain):
    x = brain.session("x")
    first = brain.join(x, "r")
    brain.tell(x, Kind.LEAVE, to=first)
    assert brain.join(x, "r") != first


def test_state_goes_once_to_each_who_shares_a_room_and_is_gone_with_the_session(brain, take):
    x, y, stranger = (brain.session(name) for name in ("x", "y", "z"))
    for room in ("r", "s"):
        brain.join(x, room)
        brain.join(y, room)
    brain.join(stranger, "t")
    for port in (x, y):
        take(port)
    brain.tell(x, Kind.STATE, value=1, data=b"k1")
    assert states(take(y)) == [("x", b"k", b"1")]
    brain.tell(x, Kind.STATE, value=1, data=b"k", flags=GONE)
    assert states(take(y)) == [("x", b"k", None)]
    brain.relay.close(x)
    assert presences(take(y)) == [("x", Change.LEFT)] * 2
    assert take(stranger) == []


def test_limits_are_answered_not_punished(make_brain):
    brain = make_brain(rooms_per_session=1, rooms=2, state_keys=1, state_bytes=2)
    x, y, z = (brain.session(name) for name in "xyz")
    brain.join(x, "r")
    assert brain.tell(x, Kind.JOIN, name="s", id=1)[0].name == "busy"
    brain.join(y, "s")
    assert brain.tell(z, Kind.JOIN, name="t", id=1)[0].name == "busy"
    assert brain.tell(z, Kind.STATE, id=2, value=1, data=b"k11")[-1].kind == Kind.ACK
    assert brain.tell(z, Kind.STATE, id=3, value=1, data=b"k111")[-1].name == "busy"
    assert brain.tell(z, Kind.STATE, id=4, value=1, data=b"l1")[-1].name == "busy"


@pytest.mark.parametrize("name", ["", "a\x07"])
def test_a_room_name_nobody_can_print_is_a_breach(brain, name):
    with pytest.raises(ProtocolError):
        brain.tell(brain.session("x"), Kind.JOIN, name=name)


class Pair:
    """Two brains and the link between them, carried by hand."""

    def __init__(self, make_brain, take):
        self.take = take
        self.a, self.b = make_brain("a"), make_brain("b")

    def link(self):
        self.to_b, self.to_a = self.a.link("b"), self.b.link("a")
        self.carry()

    def carry(self):
        while self.to_b.out or self.to_a.out:
            for frame in self.take(self.to_b):
                self.b.relay.receive(self.to_a, frame, 0.0)
            for frame in self.take(self.to_a):
                self.a.relay.receive(self.to_b, frame, 0.0)

    def cut(self):
        self.a.relay.close(self.to_b)
        self.b.relay.close(self.to_a)


@pytest.fixture
def pair(make_brain, take):
    return Pair(make_brain, take)


def test_a_link_brings_members_rooms_and_state_that_were_there_and_that_come(pair, take):
    x, y = pair.a.session("x"), pair.b.session("y")
    pair.a.join(x, "r")
    pair.b.join(y, "r")
    pair.b.tell(y, Kind.STATE, value=1, data=b"k1")
    pair.link()
    frames = take(x)
    assert presences(frames) == [("y", Change.JOINED)]
    assert states(frames) == [("y", b"k", b"1")]
    assert [(f.name, f.flags) for f in frames if f.kind == Kind.HUB] == [("b", 0), ("b", OPEN)]
    z = pair.b.session("z")
    pair.b.join(z, "r")
    pair.b.tell(y, Kind.STATE, value=1, data=b"k2")
    pair.b.relay.close(y)
    pair.carry()
    frames = take(x)
    assert presences(frames) == [("z", Change.JOINED), ("y", Change.LEFT)]
    assert states(frames) == [("y", b"k", b"2")]


def test_behind_a_dead_link_members_are_unknown_and_what_is_not_told_again_is_gone(pair, take):
    x = pair.a.session("x")
    stays, leaves, quits = (pair.b.session(name) for name in ("stays", "leaves", "quits"))
    pair.a.join(x, "r")
    for port in (stays, leaves, quits):
        number = pair.b.join(port, "r")
        pair.b.tell(port, Kind.STATE, value=1, data=b"k1")
        pair.b.tell(port, Kind.STATE, value=1, data=b"l1")
    pair.link()
    take(x)
    pair.cut()
    frames = take(x)
    assert [(f.name, f.flags) for f in frames if f.kind == Kind.HUB] == [("b", 0)]
    assert sorted(presences(frames)) == [
        (name, Change.UNKNOWN) for name in ("leaves", "quits", "stays")
    ]
    pair.b.relay.close(quits)
    pair.b.tell(leaves, Kind.LEAVE, to=number)
    pair.b.tell(stays, Kind.STATE, value=1, data=b"k", flags=GONE)
    pair.link()
    frames = take(x)
    assert sorted(presences(frames)) == [
        ("leaves", Change.LEFT),
        ("quits", Change.LEFT),
        ("stays", Change.BACK),
    ]
    assert ("stays", b"k", None) in states(frames)
    assert set(pair.a.directory.members) == {"x", "stays", "leaves"}


def test_members_of_a_hub_that_was_started_again_have_a_moment_to_come_back(brain, take):
    x = brain.session("x")
    brain.join(x, "r")

    def announce(link, *names):
        for name in names:
            brain.tell(link, Kind.MEMBER, name=name, to=1)
            brain.tell(link, Kind.PRESENCE, name=name, to=2, data=b"r")

    first = brain.link("b", "first run")
    announce(first, "back", "gone")
    brain.tell(first, Kind.SYNCED)
    brain.relay.close(first)
    take(x)
    second = brain.link("b", "second run")
    brain.tell(second, Kind.SYNCED)
    assert [(f.name, f.flags) for f in take(x) if f.kind == Kind.HUB] == [("b", OPEN)]
    announce(second, "back")
    assert presences(take(x)) == [("back", Change.BACK)]
    brain.directory.expire(RETURN_S - 0.01)
    assert take(x) == []
    brain.directory.expire(RETURN_S)
    assert presences(take(x)) == [("gone", Change.LEFT)]


def test_a_forgotten_hub_takes_its_members_along(pair, take):
    x, y = pair.a.session("x"), pair.b.session("y")
    pair.a.join(x, "r")
    pair.b.join(y, "r")
    pair.link()
    pair.cut()
    take(x)
    pair.a.directory.forget_hub("b")
    frames = take(x)
    assert presences(frames) == [("y", Change.LEFT)]
    assert frames[-1].kind == Kind.HUB and frames[-1].flags == GONE
    assert pair.a.directory.hubs == {}


def test_nothing_of_a_closed_session_stays(pair):
    for _ in range(3):
        y = pair.b.session("y")
        pair.b.join(y, "r")
        pair.b.tell(y, Kind.STATE, value=1, data=b"k1")
        pair.link()
        pair.b.relay.close(y)
        pair.carry()
        pair.cut()
    for brain in (pair.a, pair.b):
        directory = brain.directory
        assert not (directory.members or directory.rooms or directory.numbered)
        assert not (directory.addressed or directory.links or brain.relay.pending)
