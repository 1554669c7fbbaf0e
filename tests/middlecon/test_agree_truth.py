"""Whatever happens in whatever order, no two members hear different outcomes of one agreement.

The hubs, members and links of `test_truth.py`, but here the members agree: one proposes, the others
prepare or refuse, and acknowledge outcomes. Nobody commits unless all prepared; who does not know
the outcome is named, and learns it once it is in the room and can be reached.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tabane.middlecon.agree import ID_BYTES, Agreed, parse_agreed, parse_outcome
from tabane.middlecon.directory import Directory
from tabane.middlecon.frames import Decoder, Frame, Kind
from tabane.middlecon.relay import Relay
from tabane.middlecon.rooms import LinkPort, Port, SessionPort
from tabane.middlecon.session import Limits

Edge = tuple[str, str]
PAIR: tuple[Edge, ...] = (("a1", "b1"),)
TREE: tuple[Edge, ...] = (("a1", "a2"), ("b1", "b2"), ("a1", "b1"), ("b2", "c1"))


def taken(port: Port) -> list[Frame]:
    frames = Decoder().feed(b"".join(port.urgent + port.out))
    port.urgent, port.out = [], []
    return frames


def hub_of(member: str) -> str:
    return member[:2]


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


class Network(RuleBasedStateMachine):
    edges: tuple[Edge, ...]

    def __init__(self) -> None:
        super().__init__()
        hubs = sorted({hub for edge in self.edges for hub in edge})
        self.relays = {hub: Relay(Directory(hub, Limits(), hub[0]), "1") for hub in hubs}
        self.ports: dict[str, SessionPort] = {}
        self.numbers: dict[str, int] = {}
        self.links: dict[Edge, LinkPort] = {}
        self.inbox: dict[str, list[Frame]] = {}
        self.waiting: dict[tuple[SessionPort, int], Proposed] = {}
        self.proposed: dict[bytes, Proposed] = {}
        self.now = 0.0

    def do_begin(self, names: list[str], whole: bool) -> None:
        if whole:
            for edge in self.edges:
                self.do_heal(edge)
        for name in names:
            self.do_join(name)
        self.do_all()

    def receive(self, port: SessionPort | LinkPort, hub: str, frame: Frame) -> None:
        self.relays[hub].receive(port, frame, self.now)

    def do_join(self, name: str) -> None:
        if name not in self.ports:
            port = self.ports[name] = SessionPort(name, lambda: None)
            self.relays[hub_of(name)]._directory.open_session(port)
            self.inbox[name] = []
        self.receive(self.ports[name], hub_of(name), Frame(Kind.JOIN, name="r", flags=3))
        self.do_listen(name)

    def do_leave(self, name: str) -> None:
        if name in self.numbers:
            frame = Frame(Kind.LEAVE, to=self.numbers.pop(name))
            self.receive(self.ports[name], hub_of(name), frame)

    def do_crash(self, name: str) -> None:
        if name in self.ports:
            port = self.ports.pop(name)
            self.numbers.pop(name, None)
            self.waiting = {key: one for key, one in self.waiting.items() if key[0] is not port}
            self.relays[hub_of(name)].close(port)

    def do_agree(self, name: str) -> None:
        if name not in self.numbers:
            return
        room = self.relays[hub_of(name)]._directory.rooms["r"]
        known = {member.name for member, _ in room.members()} - {name}
        id, value = len(self.proposed) + 1, f"{name} {len(self.proposed)}".encode()
        self.waiting[self.ports[name], id] = self.proposed[value] = Proposed(name, known)
        frame = Frame(Kind.AGREE, to=self.numbers[name], id=id, value=1000, data=value)
        self.receive(self.ports[name], hub_of(name), frame)

    def do_listen(self, name: str) -> None:
        if name not in self.ports:
            return
        for frame in taken(self.ports[name]):
            if frame.kind == Kind.JOIN:
                self.numbers[name] = frame.to
            elif frame.kind == Kind.PREPARE:
                self.proposed[frame.data[ID_BYTES:]].asked.add(name)
                self.inbox[name].append(frame)
            elif frame.kind == Kind.OUTCOME:
                self.hear(parse_outcome(frame).value, parse_outcome(frame).committed)
                self.inbox[name].append(frame)
            elif frame.kind == Kind.AGREED:
                self.check(self.waiting.pop((self.ports[name], frame.id)), parse_agreed(frame))

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
        self.receive(self.ports[name], hub_of(name), Frame(kind, id=frame.id, name="refused"))

    def do_heal(self, edge: Edge) -> None:
        if edge in self.links:
            return
        for hub, peer in (edge, edge[::-1]):
            link = self.links[hub, peer] = LinkPort(peer, lambda: None, "", peer[0])
            self.relays[hub]._directory.open_link(link)

    def do_carry(self, edge: Edge) -> None:
        if edge in self.links:
            hub, peer = edge
            for frame in taken(self.links[edge]):
                self.receive(self.links[peer, hub], peer, frame)

    def do_cut(self, edge: Edge) -> None:
        if edge in self.links:
            for hub, peer in (edge, edge[::-1]):
                self.relays[hub].close(self.links.pop((hub, peer)))

    def do_wait(self, by_s: float) -> None:
        self.now += by_s
        for relay in self.relays.values():
            relay.expire(self.now)
            relay.check(self.now)

    def do_all(self) -> None:
        for _ in self.edges:
            for edge in list(self.links):
                self.do_carry(edge)
        for name in list(self.ports):
            self.do_listen(name)
            while self.inbox[name]:
                self.do_answer(name, False, True)
        for _ in self.edges:
            for edge in list(self.links):
                self.do_carry(edge)

    def teardown(self) -> None:
        """Let all be as it should: everyone who is there knows every outcome it waits for."""
        for _ in range(4):
            self.do_all()
            self.do_wait(4.0)
        for edge in self.edges:
            self.do_cut(edge)
            self.do_heal(edge)
        for _ in range(2 * len(self.edges)):
            for edge in list(self.links):
                self.do_carry(edge)
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


def machine(links: tuple[Edge, ...]) -> type[Network]:
    hubs = sorted({hub for edge in links for hub in edge})
    names = st.sampled_from([hub + member for hub in hubs for member in "xy"])
    cuttable = st.sampled_from(links)
    ways = st.sampled_from([*links, *(edge[::-1] for edge in links)])

    class Machine(Network):
        edges = links
        begin = initialize(names=st.lists(names, max_size=6, unique=True), whole=st.booleans())(
            lambda self, names, whole: self.do_begin(names, whole)
        )
        join = rule(name=names)(lambda self, name: self.do_join(name))
        leave = rule(name=names)(lambda self, name: self.do_leave(name))
        crash = rule(name=names)(lambda self, name: self.do_crash(name))
        agree = rule(name=names)(lambda self, name: self.do_agree(name))
        listen = rule(name=names)(lambda self, name: self.do_listen(name))
        answer = rule(name=names, last=st.booleans(), can=st.sampled_from([True, True, False]))(
            lambda self, name, last, can: self.do_answer(name, last, can)
        )
        heal = rule(edge=cuttable)(lambda self, edge: self.do_heal(edge))
        carry = rule(edge=ways)(lambda self, edge: self.do_carry(edge))
        cut = rule(edge=cuttable)(lambda self, edge: self.do_cut(edge))
        wait = rule(by_s=st.floats(0.1, 1.0))(lambda self, by_s: self.do_wait(by_s))
        all_goes_well = rule()(lambda self: self.do_all())

    Machine.TestCase.settings = settings(
        max_examples=100, stateful_step_count=50, deadline=None, print_blob=False
    )
    return Machine


TestPair = machine(PAIR).TestCase
TestTree = machine(TREE).TestCase
