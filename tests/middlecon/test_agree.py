"""All members of a room take a value, or none: decided without IO."""

from __future__ import annotations

from pathlib import Path

import pytest

from tabane.errors import ProtocolError
from tabane.middlecon import Cause, agree
from tabane.middlecon.agree import Agreed, Verdict, encode_agreed, outcome_frame, parse_agreed
from tabane.middlecon.chat import LOBBY
from tabane.middlecon.frames import MORE, RAISED, Decoder, Frame, JoinFlag, Kind, encode_frame
from tabane.middlecon.receipts import Reason, Sum, encode_receipt


class Trio:
    """The proposer `x` and the members `y` and `z` of one room, as a hub sees them."""

    def __init__(self, brain, take):
        self.brain, self.take = brain, take
        self.ports = {name: brain.session(name) for name in "xyz"}
        numbers = [brain.join(port, "r", JoinFlag.MEMBER) for port in self.ports.values()]
        self.number = numbers[-1]

    def propose(self, value=b"v", timeout=1000):
        """What x gets at once, and the ids of the PREPAREs of y and z."""
        fields = {"to": self.number, "id": 9, "value": timeout, "data": value}
        return self.brain.tell(self.ports["x"], Kind.AGREE, **fields)

    def heard(self, name, kind):
        (frame,) = [f for f in self.take(self.ports[name]) if f.kind == kind]
        return frame

    def receive(self, name, frame):
        self.brain.relay.receive(self.ports[name], frame, self.brain.now)

    def answer(self, name, frame):
        self.receive(name, Frame(Kind.ACK, id=frame.id))

    def prepare(self, *names):
        for name in names:
            self.answer(name, self.heard(name, Kind.PREPARE))

    def outcome(self, name, answers=True):
        frame = self.heard(name, Kind.OUTCOME)
        if answers:
            self.answer(name, frame)
        return agree.parse_outcome(frame).committed

    def agreed(self):
        return parse_agreed(self.heard("x", Kind.AGREED))

    def back(self, name):
        """The member's session ends, if it has one, and it joins anew."""
        if self.ports[name] in self.brain.directory.sessions:
            self.brain.relay.close(self.ports[name])
        port = self.ports[name] = self.brain.session(name)
        self.receive(port.name, Frame(Kind.JOIN, name="r", flags=JoinFlag.MEMBER))

    def expire(self, now):
        self.brain.relay.expire(now)
        self.brain.relay.check(now)


@pytest.fixture
def trio(brain, take):
    return Trio(brain, take)


def test_all_prepare_then_all_commit(trio):
    assert trio.propose() == []
    frame = trio.heard("y", Kind.PREPARE)
    assert (frame.name, frame.value, frame.data[16:]) == ("x", 1000, b"v")
    trio.answer("y", frame)
    assert trio.take(trio.ports["y"]) == []
    trio.prepare("z")
    assert [trio.outcome("y"), trio.outcome("z")] == [True, True]
    agreed = trio.agreed()
    assert (agreed.committed, sorted(agreed.prepared), agreed.untold) == (True, ["y", "z"], [])
    assert trio.brain.relay.pending == {}
    assert len(trio.brain.relay.agreements) == 0


def test_alone_one_agrees_with_oneself(brain, take):
    x = brain.session("x")
    number = brain.join(x, "r")
    (frame,) = brain.tell(x, Kind.AGREE, to=number, id=1, value=10)
    assert parse_agreed(frame) == Agreed(True, False)


def test_one_that_refuses_makes_all_abort(trio):
    trio.propose()
    trio.prepare("y")
    id = trio.heard("z", Kind.PREPARE).id
    trio.receive("z", Frame(Kind.NACK, id=id, name="full", flags=RAISED, data=b"no"))
    assert [trio.outcome("y"), trio.outcome("z")] == [False, False]
    agreed = trio.agreed()
    assert (agreed.committed, agreed.prepared) == (False, ["y"])
    assert agreed.refused == {"z": Reason(Cause.REFUSED, "no", "full")}


def test_the_deadline_aborts(trio):
    trio.propose(timeout=1000)
    trio.prepare("y")
    trio.expire(0.9)
    late = trio.heard("z", Kind.PREPARE)
    trio.expire(1.0)
    trio.answer("z", late)
    assert trio.outcome("y") is False
    assert trio.outcome("z", answers=False) is False
    trio.expire(1.9)
    assert trio.take(trio.ports["x"]) == []
    trio.expire(2.0)
    agreed = trio.agreed()
    assert agreed.refused == {"z": Reason(Cause.TIMED_OUT)}
    assert agreed.untold == ["z"]


def test_one_that_joins_meanwhile_makes_all_abort_and_hears_it(trio):
    trio.propose()
    trio.ports["w"] = trio.brain.session("w")
    trio.brain.join(trio.ports["w"], "r", JoinFlag.MEMBER)
    trio.prepare("y", "z")
    assert [trio.outcome(name) for name in "wyz"] == [False, False, False]
    agreed = trio.agreed()
    assert (agreed.committed, agreed.changed) == (False, True)
    assert sorted(agreed.prepared) == ["y", "z"]


def test_one_that_is_frozen_makes_all_abort_and_hears_it_when_it_thaws(trio):
    member = trio.ports["z"].member
    trio.brain.directory.set_asleep(member, True)
    trio.propose()
    trio.prepare("y")
    trio.outcome("y")
    agreed = trio.agreed()
    assert (agreed.committed, agreed.asleep, agreed.untold) == (False, ["z"], ["z"])
    assert trio.take(trio.ports["z"]) == []
    trio.brain.directory.set_asleep(member, False)
    assert trio.outcome("z") is False
    assert len(trio.brain.relay.agreements) == 0


def test_a_proposer_that_dies_before_the_decision_leaves_nobody_in_doubt(trio):
    trio.propose(timeout=60_000)
    trio.prepare("y")
    trio.brain.relay.close(trio.ports["x"])
    assert [trio.outcome("y"), trio.outcome("z")] == [False, False]
    assert trio.brain.relay.pending == {}
    trio.back("x")
    frame = trio.heard("x", Kind.OUTCOME)
    verdict = agree.parse_outcome(frame)
    assert (verdict.proposer, verdict.value, verdict.committed) == ("x", b"v", False)


def test_a_proposer_that_dies_after_the_decision_learns_it_when_it_is_back(trio):
    trio.propose()
    trio.prepare("y", "z")
    trio.brain.relay.close(trio.ports["x"])
    assert [trio.outcome("y"), trio.outcome("z")] == [True, True]
    trio.back("x")
    assert trio.outcome("x") is True
    assert len(trio.brain.relay.agreements) == 0


def test_a_member_that_dies_before_it_hears_is_named_and_told_when_it_is_back(trio):
    trio.propose()
    trio.prepare("y", "z")
    trio.outcome("y")
    trio.brain.relay.close(trio.ports["z"])
    agreed = trio.agreed()
    assert (agreed.committed, agreed.untold) == (True, ["z"])
    trio.back("z")
    frame = trio.heard("z", Kind.OUTCOME)
    verdict = agree.parse_outcome(frame)
    assert (frame.to, verdict.room, verdict.value, verdict.committed) == (0, "r", b"v", True)
    trio.back("z")  # it dies again, and has not acknowledged
    assert trio.outcome("z") is True
    trio.back("z")
    assert [f.kind for f in trio.take(trio.ports["z"])] == [Kind.JOIN, Kind.SYNCED]


def test_a_member_that_dies_with_the_last_preparation_missing_is_settled_at_once(trio):
    trio.propose(timeout=60_000)
    trio.prepare("y")
    trio.brain.relay.close(trio.ports["z"])
    assert trio.outcome("y") is False
    agreed = trio.agreed()
    assert agreed.refused == {"z": Reason(Cause.CLOSED)}
    assert agreed.untold == ["z"]


def test_a_member_that_is_too_slow_is_told_again_without_leaving(trio):
    trio.propose(timeout=1000)
    trio.prepare("y", "z")
    trio.outcome("y")
    trio.outcome("z", answers=False)
    trio.expire(1.0)
    assert trio.agreed().untold == ["z"]
    assert trio.outcome("z", answers=False) is True  # at once, as it is there
    trio.expire(0.5 + agree.TELL_S)
    trio.expire(1.0 + agree.TELL_S)
    assert trio.take(trio.ports["z"]) == []
    trio.expire(1.0 + agree.TELL_S + agree.AGAIN_S)
    assert trio.outcome("z") is True
    assert len(trio.brain.relay.agreements) == 0


def test_what_is_kept_is_bounded_in_time(trio):
    trio.propose()
    trio.prepare("y", "z")
    trio.outcome("y")
    trio.brain.relay.close(trio.ports["z"])
    agreements = trio.brain.relay.agreements
    trio.expire(agree.KEPT_S - 1)
    assert len(agreements) == 1
    trio.expire(agree.KEPT_S)
    assert (len(agreements), agreements.forgotten) == (0, 1)
    trio.back("z")
    assert [f.kind for f in trio.take(trio.ports["z"])] == [Kind.JOIN, Kind.SYNCED]


def test_what_is_kept_is_bounded_in_number_and_the_oldest_goes_first(make_brain, take):
    trio = Trio(make_brain(untold=2), take)
    for value in (b"1", b"2", b"3"):
        trio.propose(value)
        trio.prepare("y", "z")
        trio.outcome("y")
        trio.brain.relay.close(trio.ports["z"])
        agreements = trio.brain.relay.agreements
        trio.back("z")
        told = [f for f in take(trio.ports["z"]) if f.kind == Kind.OUTCOME]
    assert [agree.parse_outcome(frame).value for frame in told] == [b"2", b"3"]
    assert (len(agreements), agreements.forgotten) == (2, 1)


def test_who_may_not_propose_is_told_why(make_brain):
    brain = make_brain(agree_bytes=3)
    x = brain.session("x")
    number, lobby = brain.join(x, "r"), brain.join(x, LOBBY)
    for to, data, cause in ((99, b"", "not_found"), (number, b"1234", "refused")):
        (frame,) = brain.tell(x, Kind.AGREE, to=to, id=5, value=10, data=data)
        assert (frame.kind, frame.id, frame.name) == (Kind.NACK, 5, cause)
    (frame,) = brain.tell(x, Kind.AGREE, to=lobby, id=6, value=10)
    assert (frame.name, b"people" in frame.data) == ("refused", True)


def test_who_answers_for_the_hub_is_cut_off(trio):
    trio.propose()
    frame = trio.heard("y", Kind.PREPARE)
    with pytest.raises(ProtocolError, match="not for it"):
        trio.answer("y", Frame(Kind.ACK, id=frame.id - 1))
    with pytest.raises(ProtocolError, match="not for it"):
        trio.receive("y", Frame(Kind.NACK, id=frame.id - 1))
    for kind in (Kind.PREPARE, Kind.OUTCOME, Kind.AGREED):
        with pytest.raises(ProtocolError, match="not for this side"):
            trio.brain.tell(trio.ports["y"], kind)


class TestLinks:
    """This hub coordinates; y is at the hub `b`."""

    @pytest.fixture
    def far(self, brain, take):
        x, link = brain.session("x"), brain.link("b")
        self.tell_of_y(brain, link)
        number = brain.join(x, "r", JoinFlag.MEMBER)
        take(link)
        return x, link, number

    def tell_of_y(self, brain, link):
        for frame in (
            Frame(Kind.MEMBER, name="y", to=71),
            Frame(Kind.PRESENCE, name="y", to=70, data=b"r"),
            Frame(Kind.SYNCED),
        ):
            brain.relay.receive(link, frame, brain.now)

    def sum_up(self, brain, link, id, total):
        (part,) = encode_receipt(id, total)
        (frame,) = Decoder().feed(part)
        brain.relay.receive(link, frame, brain.now)

    def test_one_copy_and_one_sum_for_each_phase(self, brain, take, far):
        x, link, number = far
        brain.tell(x, Kind.AGREE, to=number, id=9, value=1000, data=b"v")
        for kind in (Kind.PREPARE, Kind.OUTCOME):
            (copy,) = take(link)
            assert (copy.kind, copy.to, copy.name) == (kind, 70, "x")
            self.sum_up(brain, link, copy.id, Sum(["y"]))
        (frame,) = take(x)
        assert parse_agreed(frame) == Agreed(True, False, ["y"])

    def test_a_link_that_dies_aborts_and_who_is_behind_it_is_told_when_it_heals(
        self, brain, take, far
    ):
        x, link, number = far
        brain.tell(x, Kind.AGREE, to=number, id=9, value=1000, data=b"v")
        brain.relay.close(link)
        agreed = parse_agreed(next(f for f in take(x) if f.kind == Kind.AGREED))
        assert (agreed.committed, agreed.unknown, agreed.untold) == (False, ["y"], ["y"])
        again = brain.link("b")
        self.tell_of_y(brain, again)
        (frame,) = [f for f in take(again) if f.kind == Kind.OUTCOME]
        assert (frame.to, frame.flags) == (71, 0)
        brain.tell(again, Kind.ACK, id=frame.id)
        assert len(brain.relay.agreements) == 0

    def test_outcomes_pass_through_to_a_room_or_one_member(self, brain, take):
        y, link = brain.session("y"), brain.link("b")
        number = brain.join(y, "r", JoinFlag.MEMBER)
        take(link)
        frame = outcome_frame(Verdict(b"i" * 16, "r", "gone", b"v", True), 1.0)
        frame.id, frame.flags, frame.to = 5, 1, number
        brain.relay.receive(link, frame, 0.0)
        (heard,) = take(y)
        assert (heard.kind, heard.to, heard.name) == (Kind.OUTCOME, number, "gone")
        brain.tell(y, Kind.ACK, id=heard.id)
        assert take(link)[0].kind == Kind.RECEIPT
        frame.flags, frame.to = 0, y.member.number
        brain.relay.receive(link, frame, 0.0)
        (heard,) = take(y)
        assert (heard.kind, heard.to) == (Kind.OUTCOME, 0)
        brain.tell(y, Kind.ACK, id=heard.id)
        assert [f.kind for f in take(link)] == [Kind.ACK]
        frame.to = 999
        brain.relay.receive(link, frame, 0.0)
        assert [f.kind for f in take(link)] == [Kind.NACK]


def test_the_bytes_in_the_protocols_page():
    id = bytes.fromhex("0146916214e05f30") + bytes.fromhex("5ad01f3e") + (1).to_bytes(4)
    prepare = encode_frame(Kind.PREPARE, to=3, id=9, value=1000, name="web-1", data=id + b"v42")
    verdict = Verdict(id, "deploys", "web-1", b"v42", True)
    frame = outcome_frame(verdict, 1.0)
    assert agree.parse_outcome(frame) == verdict
    outcome = encode_frame(Kind.OUTCOME, id=10, value=1000, name="web-1", data=frame.data)
    page = (Path(__file__).parents[2] / "docs/protocol.md").read_text()
    text = "".join(page.split())
    assert prepare.hex() in text
    assert outcome.hex() in text
    assert id.hex() in text


@pytest.mark.parametrize("data", [b"", b"\x01" * 17, b"\x02" + b"i" * 16 + b"\x00", b"\x01" * 18])
def test_an_outcome_that_cannot_be_read_is_a_breach(data):
    with pytest.raises(ProtocolError):
        agree.parse_outcome(Frame(Kind.OUTCOME, data=data))


def test_thousands_of_names_come_in_parts():
    names = [f"member-{n}" for n in range(3000)]
    refused = {name: Reason(Cause.CLOSED) for name in names[:700]}
    agreed = Agreed(False, True, names, refused, names[:1], names[:2], names[:2500])
    frames = Decoder().feed(b"".join(encode_agreed(7, agreed)))
    assert [frame.flags for frame in frames] == [MORE] * (len(frames) - 1) + [0]
    total = Agreed(False, True, [], {}, [], [], [])
    for frame in frames:
        part = parse_agreed(frame)
        assert (part.committed, part.changed) == (False, True)
        total.add(part)
    assert total == agreed
    with pytest.raises(ProtocolError):
        parse_agreed(Frame(Kind.AGREED, data=b"?"))
