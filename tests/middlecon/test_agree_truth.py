"""Whatever happens in whatever order, no two members hear different outcomes of one agreement.

Members of the network agree: one proposes, the others prepare or refuse, and acknowledge outcomes.
Nobody commits unless all prepared; who does not know the outcome is named, and learns it once it is
in the room and can be reached.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from tests.middlecon.network import PAIR, TREE, Network, hub_of, machine

from tabane.middlecon.agree import ID_BYTES, Agreed, parse_agreed, parse_outcome
from tabane.middlecon.frames import Frame, Kind
from tabane.middlecon.ports import SessionPort


class Proposed:
    """One agreement, found by its value, which is its proposer's name and a number."""

    def __init__(self, proposer: str, known: set[str]) -> None:
        self.proposer = proposer
        self.known = known
        """Who the proposer's hub knows to be in the room."""
        self.asked: set[str] = set()
        self.prepared: set[str] = set()
        self.told: set[str] = set()
        """Who acknowledged the outcome."""
        self.outcomes: set[bool] = set()
        self.untold: set[str] = set()


class Agreeing(Network):
    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[tuple[SessionPort, int], Proposed] = {}
        self.proposed: dict[bytes, Proposed] = {}

    def on_crash(self, port: SessionPort) -> None:
        self.waiting = {key: one for key, one in self.waiting.items() if key[0] is not port}

    def on_frame(self, name: str, frame: Frame) -> None:
        if frame.kind == Kind.PREPARE:
            self.proposed[frame.data[ID_BYTES:]].asked.add(name)
            self.inbox[name].append(frame)
        elif frame.kind == Kind.OUTCOME:
            self.hear(parse_outcome(frame).value, parse_outcome(frame).committed)
            self.inbox[name].append(frame)
        elif frame.kind == Kind.AGREED:
            self.check(self.waiting.pop((self.ports[name], frame.id)), parse_agreed(frame))

    def do_begin(self, names: list[str], whole: bool) -> None:
        if whole:
            for edge in self.edges:
                self.do_heal(edge)
        for name in names:
            self.do_join(name)
        self.do_all()

    def do_agree(self, name: str) -> None:
        if name not in self.numbers:
            return
        room = self.relays[hub_of(name)]._directory.rooms["r"]
        known = {member.name for member, _ in room.members()} - {name}
        id, value = len(self.proposed) + 1, f"{name} {len(self.proposed)}".encode()
        self.waiting[self.ports[name], id] = self.proposed[value] = Proposed(name, known)
        self.answer(name, Frame(Kind.AGREE, to=self.numbers[name], id=id, value=1000, data=value))

    def hear(self, value: bytes, committed: bool) -> None:
        one = self.proposed[value]
        one.outcomes.add(committed)
        assert len(one.outcomes) == 1, "there is one outcome"
        if committed:
            assert one.asked == one.prepared, "all who were asked have prepared"
            assert one.known <= one.prepared, "all members were asked"

    def check(self, one: Proposed, agreed: Agreed) -> None:
        value = next(value for value, other in self.proposed.items() if other is one)
        self.hear(value, agreed.committed)
        fates = [*agreed.prepared, *agreed.refused, *agreed.unknown, *agreed.asleep]
        assert len(fates) == len(set(fates))
        assert one.proposer not in fates
        assert set(agreed.prepared) <= one.prepared
        one.untold = set(agreed.untold)
        assert one.known - one.told <= one.untold, "who is not told is named"
        assert not (agreed.committed and agreed.changed)

    def do_answer(self, name: str, last: bool, can: bool) -> None:
        """A member is done with one of the frames it got."""
        if name not in self.ports or not self.inbox[name]:
            return
        frame = self.inbox[name].pop(-1 if last else 0)
        kind = Kind.ACK
        if frame.kind == Kind.OUTCOME:
            self.proposed[parse_outcome(frame).value].told.add(name)
        elif can:
            self.proposed[frame.data[ID_BYTES:]].prepared.add(name)
        else:
            kind = Kind.NACK
        self.answer(name, Frame(kind, id=frame.id, name="refused"))

    def do_all(self) -> None:
        self.carry_all()
        for name in list(self.ports):
            self.do_listen(name)
            while self.inbox[name]:
                self.do_answer(name, False, True)
        self.carry_all()

    def teardown(self) -> None:
        """Let all be as it should: everyone who is there knows every outcome it waits for."""
        for _ in range(4):
            self.do_all()
            self.do_wait(4.0)
        self.link_anew()
        for _ in range(5):
            self.do_all()
            self.do_wait(6.0)
        assert self.waiting == {}
        assert all(relay.pending == {} for relay in self.relays.values())
        for one in self.proposed.values():
            assert one.untold & set(self.numbers) <= one.told
            assert one.known & set(self.numbers) <= one.told
        for relay in self.relays.values():
            kept = {untold.name for untold in relay.agreements._kept}
            assert not kept & set(self.numbers)


def rules(names):
    return {
        "do_begin": initialize(names=st.lists(names, max_size=6, unique=True), whole=st.booleans()),
        "do_agree": rule(name=names),
        "do_answer": rule(name=names, last=st.booleans(), can=st.sampled_from([True, True, False])),
        "do_all": rule(),
    }


TestPair = machine(Agreeing, PAIR, rules)
TestTree = machine(Agreeing, TREE, rules)
