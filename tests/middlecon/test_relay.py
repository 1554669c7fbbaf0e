"""The fate of messages, decided without IO."""

from __future__ import annotations

import pytest

from tabane.errors import ProtocolError
from tabane.middlecon.frames import MORE, RAISED, Decoder, Frame, JoinFlag, Kind
from tabane.middlecon.receipts import Cause, Reason, Sum, encode_receipt, parse_receipt
from tabane.middlecon.tallies import LINK_GRACE_S, Call, Tally


@pytest.fixture
def trio(brain, take):
    """x, y and z in one room, whose number comes last."""
    ports = [brain.session(name) for name in "xyz"]
    number = [brain.join(port, "r", JoinFlag.MEMBER) for port in ports][-1]
    for port in ports:
        take(port)
    return *ports, number


def receipt_of(frames):
    total = Sum([], {}, [], [])
    for frame in frames:
        if frame.kind == Kind.RECEIPT:
            total.add(parse_receipt(frame))
    return total


def say(brain, take, port, number, *targets, kind=Kind.SAY, id=9, value=1000):
    """Say, and the id that the copies carry."""
    assert brain.tell(port, kind, to=number, id=id, value=value, data=b"m") == []
    copies = [take(target) for target in targets]
    assert {(f.kind, f.name, f.data, f.value) for (f,) in copies} == {
        (kind, port.name, b"m", value)
    }
    return copies[0][0].id


def test_a_receipt_tells_each_members_fate_and_comes_with_the_last(brain, take, trio):
    x, y, z, number = trio
    id = say(brain, take, x, number, y, z)
    brain.tell(y, Kind.ACK, id=id)
    assert take(x) == []
    brain.tell(z, Kind.NACK, id=id, name="stale", flags=RAISED, data=b"gone")
    (frame,) = take(x)
    assert frame.id == 9
    total = parse_receipt(frame)
    assert total.acknowledged == ["y"]
    assert total.failed == {"z": Reason(Cause.REFUSED, "gone", "stale")}
    assert brain.relay.pending == {}


def test_answers_go_on_at_once_and_the_receipt_follows(brain, take, trio):
    x, y, z, number = trio
    id = say(brain, take, x, number, y, z, kind=Kind.ASK)
    brain.tell(y, Kind.ACK, id=id, data=b"42")
    (answer,) = take(x)
    assert (answer.kind, answer.id, answer.name, answer.data) == (Kind.ANSWER, 9, "y", b"42")
    brain.relay.close(z)
    assert receipt_of(take(x)).failed == {"z": Reason(Cause.CLOSED)}


def test_nobody_there_is_a_receipt_too(brain, take):
    x = brain.session("x")
    number = brain.join(x, "r")
    (frame,) = brain.tell(x, Kind.SAY, to=number, id=1, value=10)
    assert parse_receipt(frame) == Sum([], {}, [], [])


def test_the_deadline_fails_who_is_silent_and_late_answers_change_nothing(brain, take, trio):
    x, y, z, number = trio
    id = say(brain, take, x, number, y, z, value=1000)
    brain.tell(y, Kind.ACK, id=id)
    brain.relay.expire(0.999)
    assert take(x) == []
    brain.relay.expire(1.0)
    total = receipt_of(take(x))
    assert (total.acknowledged, total.failed) == (["y"], {"z": Reason(Cause.TIMED_OUT)})
    assert brain.tell(z, Kind.ACK, id=id) == []


def test_who_answers_twice_or_for_others_is_cut_off(brain, take, trio):
    x, y, z, number = trio
    id = say(brain, take, x, number, y, z)
    brain.tell(y, Kind.ACK, id=id)
    with pytest.raises(ProtocolError, match="twice"):
        brain.tell(y, Kind.ACK, id=id)
    brain.tell(x, Kind.CALL, id=1, value=1000, name="y")
    (call,) = take(y)
    with pytest.raises(ProtocolError, match="not for it"):
        brain.tell(z, Kind.ACK, id=call.id)


def test_frames_that_are_not_for_this_side_are_a_breach(brain, trio):
    x, *_ = trio
    for kind in (Kind.RECEIPT, Kind.MEMBER, Kind.WELCOME, 99):
        with pytest.raises(ProtocolError):
            brain.tell(x, kind)


def test_overloaded_members_fail_and_casts_to_them_are_dropped(make_brain, take):
    brain = make_brain(queue_bytes=10)
    x, y = brain.session("x"), brain.session("y")
    brain.join(x, "r")
    number = brain.join(y, "r", JoinFlag.MEMBER)
    take(x)
    y.backlog = 11
    assert receipt_of(brain.tell(x, Kind.SAY, to=number, id=1, value=9)).failed == {
        "y": Reason(Cause.OVERLOADED)
    }
    assert brain.tell(x, Kind.CALL, name="y", id=2, value=9)[0].name == "busy"
    brain.tell(x, Kind.CAST, to=number)
    assert (take(y), y.dropped) == ([], 1)


def test_calls_go_to_one_and_the_answer_comes_back(brain, take, trio):
    x, y, _, _ = trio
    brain.tell(x, Kind.CALL, name="y", id=5, value=1000, data=b"q")
    (copy,) = take(y)
    assert (copy.kind, copy.name, copy.data) == (Kind.CALL, "x", b"q")
    brain.tell(y, Kind.ACK, id=copy.id, data=b"a")
    (answer,) = take(x)
    assert (answer.kind, answer.id, answer.data) == (Kind.ACK, 5, b"a")


@pytest.mark.parametrize(
    ("happens", "cause"),
    [
        (lambda brain, x, y: brain.relay.close(y), Cause.CLOSED),
        (lambda brain, x, y: brain.relay.expire(2.0), Cause.TIMED_OUT),
    ],
)
def test_a_call_fails_when(brain, take, trio, happens, cause):
    x, y, _, _ = trio
    brain.tell(x, Kind.CALL, name="y", id=5, value=1000)
    happens(brain, x, y)
    (frame,) = take(x)
    assert (frame.kind, frame.id, frame.name) == (Kind.NACK, 5, cause)
    assert brain.relay.pending == {}


def test_no_such_member(brain, trio):
    x, *_ = trio
    (frame,) = brain.tell(x, Kind.CALL, name="nobody", id=5, value=1000)
    assert (frame.kind, frame.name) == (Kind.NACK, Cause.NOT_FOUND)
    assert brain.tell(x, Kind.POST, name="nobody") == []


def test_what_a_session_was_waiting_for_ends_with_it(brain, take, trio):
    x, _, _, number = trio
    brain.tell(x, Kind.CALL, name="y", id=5, value=1000)
    brain.tell(x, Kind.SAY, to=number, id=6, value=1000)
    brain.relay.close(x)
    assert brain.relay.pending == {}


def test_who_has_left_the_room_and_then_closes_has_failed(brain, take, trio):
    x, y, z, number = trio
    say(brain, take, x, number, y, z)
    brain.tell(z, Kind.LEAVE, to=number)
    brain.join(z, "r", JoinFlag.MEMBER)
    brain.tell(y, Kind.LEAVE, to=number)
    assert take(x) == []
    brain.relay.close(y)
    brain.relay.close(z)
    assert receipt_of(take(x)).failed == dict.fromkeys("yz", Reason(Cause.CLOSED))
    assert brain.relay.pending == {}


def test_a_sender_that_has_left_the_room_and_then_closes_is_told_nothing(brain, take, trio):
    x, y, z, number = trio
    say(brain, take, x, number, y, z)
    brain.tell(x, Kind.LEAVE, to=number)
    brain.relay.close(x)
    assert brain.relay.pending == {} and take(x) == []
    brain.relay.close(y)


def test_one_that_calls_itself_and_closes_leaves_nothing(brain, take, trio):
    x, y, *_ = trio
    brain.tell(x, Kind.CALL, name="x", id=1, value=1000)
    brain.tell(y, Kind.CALL, name="x", id=1, value=1000)
    brain.relay.close(x)
    assert brain.relay.pending == y.calls == {}
    assert [(frame.kind, frame.name) for frame in take(y)] == [(Kind.NACK, Cause.CLOSED)]


def test_a_session_that_ends_asks_nothing_of_what_is_not_its_own(brain, take, trio, monkeypatch):
    x, y, z, number = trio
    say(brain, take, x, number, y, z)
    brain.tell(x, Kind.CALL, name="y", id=2, value=1000)
    other = brain.session("other")
    brain.join(other, "elsewhere")
    monkeypatch.setattr(Tally, "on_closed", lambda *_: pytest.fail("it has to do with it"))
    monkeypatch.setattr(Call, "on_closed", lambda *_: pytest.fail("it has to do with it"))
    brain.relay.close(other)
    assert len(brain.relay.pending) == 2


def test_what_is_remembered_of_rooms_that_were_left_goes_with_their_messages(brain, take, trio):
    x, y, z, number = trio
    id = say(brain, take, x, number, y, z)
    brain.tell(y, Kind.LEAVE, to=number)
    assert [room.name for room in y.left] == ["r"]
    for port in (y, z):
        brain.tell(port, Kind.ACK, id=id)
    assert receipt_of(take(x)).acknowledged == ["y", "z"]
    number = brain.join(x, "s", JoinFlag.MEMBER)
    brain.join(y, "s", JoinFlag.MEMBER)
    say(brain, take, x, number, y)
    brain.tell(y, Kind.LEAVE, to=number)
    assert [room.name for room in y.left] == ["s"]


def test_statistics_count_what_is_said_in_each_room(brain, take, trio):
    x, y, z, number = trio
    say(brain, take, x, number, y, z)
    brain.tell(y, Kind.CAST, to=number)
    brain.tell(y, Kind.CALL, name="x", id=1, value=1000)
    brain.join(x, "quiet")
    assert brain.relay.stats()["messages"] == {"r": 2, "quiet": 0}


def test_ids_wrap_around(brain, take, trio):
    x, y, _, _ = trio
    brain.relay._last_id = 2**32 - 1
    brain.tell(x, Kind.CALL, name="y", id=5, value=1000)
    assert take(y)[0].id == 1


class TestLinks:
    """What this hub does with its link to `b`, where y and z are."""

    @pytest.fixture
    def far(self, brain, take):
        x, link = brain.session("x"), brain.link("b")
        for name, to in (("y", 71), ("z", 72)):
            brain.tell(link, Kind.MEMBER, name=name, to=to)
            brain.tell(link, Kind.PRESENCE, name=name, to=70, data=b"r")
        brain.tell(link, Kind.SYNCED)
        number = brain.join(x, "r", JoinFlag.MEMBER)
        take(link)
        return x, link, number

    def say(self, brain, take, far):
        x, link, number = far
        assert brain.tell(x, Kind.SAY, to=number, id=9, value=1000) == []
        (copy,) = take(link)
        assert (copy.to, copy.name) == (70, "x")
        return copy.id

    def test_one_copy_and_one_sum(self, brain, take, far):
        x, link, _ = far
        id = self.say(brain, take, far)
        parts = list(encode_receipt(id, Sum(["y"], {"z": Reason(Cause.CLOSED)}, [], [])))
        assert len(parts) == 1
        brain.tell(link, Kind.RECEIPT, id=id, data=parts[0][20:])
        total = receipt_of(take(x))
        assert (total.acknowledged, total.failed) == (["y"], {"z": Reason(Cause.CLOSED)})

    def test_a_sum_in_parts_and_a_link_that_dies_between_them(self, brain, take, far):
        x, link, _ = far
        id = self.say(brain, take, far)
        (part,) = encode_receipt(id, Sum(["y"], {}, [], []))
        brain.tell(link, Kind.RECEIPT, id=id, flags=MORE, data=part[20:])
        assert take(x) == []
        brain.relay.close(link)
        total = receipt_of(take(x))
        assert (total.acknowledged, total.unknown) == (["y"], ["z"])

    def test_a_slow_link_has_a_moment_more(self, brain, take, far):
        x, _, _ = far
        self.say(brain, take, far)
        brain.relay.expire(1.0)
        assert take(x) == []
        brain.relay.expire(1.0 + LINK_GRACE_S)
        assert sorted(receipt_of(take(x)).unknown) == ["y", "z"]

    def test_while_the_link_is_down_no_copy_left(self, brain, take, far):
        x, link, number = far
        brain.relay.close(link)
        take(x)
        frames = brain.tell(x, Kind.SAY, to=number, id=9, value=1000)
        assert set(receipt_of(frames).failed) == {"y", "z"}
        assert {r.cause for r in receipt_of(frames).failed.values()} == {Cause.UNREACHABLE}
        (frame,) = brain.tell(x, Kind.CALL, name="y", id=5, value=1000)
        assert frame.name == Cause.UNREACHABLE

    def test_a_call_goes_by_the_far_hubs_number_and_ends_with_the_link(self, brain, take, far):
        x, link, _ = far
        brain.tell(x, Kind.CALL, name="y", id=5, value=1000)
        (copy,) = take(link)
        assert (copy.to, copy.name) == (71, "x")
        brain.relay.close(link)
        nack = take(x)[0]
        assert (nack.kind, nack.name) == (Kind.NACK, Cause.CLOSED)

    def test_what_comes_over_a_link_never_goes_on_over_one(self, brain, take, far):
        x, link, number = far
        other = brain.link("c")
        brain.tell(other, Kind.MEMBER, name="w", to=1)
        brain.tell(other, Kind.PRESENCE, name="w", to=2, data=b"r")
        take(other)
        brain.tell(link, Kind.SAY, to=number, id=3, name="y", value=1000, data=b"m")
        assert take(other) == []
        (copy,) = (f for f in take(x) if f.kind == Kind.SAY)
        brain.tell(x, Kind.ACK, id=copy.id)
        assert receipt_of(take(link)).acknowledged == ["x"]

    def test_a_room_that_ended_meanwhile_has_an_empty_sum(self, brain, far):
        _, link, _ = far
        (frame,) = brain.tell(link, Kind.SAY, to=999, id=3, name="y", value=1000)
        assert (frame.kind, frame.id) == (Kind.RECEIPT, 3)

    def test_a_hub_speaks_for_its_own_members_only(self, brain, far):
        _, link, number = far
        for kind in (Kind.SAY, Kind.CAST, Kind.CALL, Kind.POST):
            with pytest.raises(ProtocolError, match="speak for"):
                brain.tell(link, kind, to=number, name="x")


def test_a_long_receipt_comes_in_parts() -> None:
    total = Sum(
        [f"m{n}" for n in range(4100)],
        {f"f{n}": Reason(Cause.CLOSED) for n in range(600)},
        [f"u{n}" for n in range(2001)],
        ["asleep"],
        3,
    )
    frames = Decoder().feed(b"".join(encode_receipt(1, total)))
    assert [f.flags for f in frames] == [MORE] * (len(frames) - 1) + [0]
    assert receipt_of(frames) == total


def test_a_receipt_that_cannot_be_read_is_a_breach() -> None:
    with pytest.raises(ProtocolError):
        parse_receipt(Frame(Kind.RECEIPT, data=b"\xc1"))
