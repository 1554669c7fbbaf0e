"""Whatever happens in whatever order, every receipt tells the truth.

Two hubs, or five in three data centers, with two members each, and one room; members join, leave,
crash, say and acknowledge, links are cut and healed, frames travel when the machine lets them.
Every `say` ends in exactly one receipt.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tabane.middlecon.directory import Directory
from tabane.middlecon.frames import Decoder, Frame, JoinFlag, Kind
from tabane.middlecon.receipts import Cause, Sum, parse_receipt
from tabane.middlecon.relay import Relay
from tabane.middlecon.rooms import LinkPort, Port, SessionPort
from tabane.middlecon.session import Limits

Edge = tuple[str, str]
PAIR: tuple[Edge, ...] = (("a1", "b1"),)
TREE: tuple[Edge, ...] = (("a1", "a2"), ("b1", "b2"), ("a1", "b1"), ("b2", "c1"))
"""Hubs of one data center begin with the same letter."""


def taken(port: Port) -> list[Frame]:
    frames = Decoder().feed(b"".join(port.urgent + port.out))
    port.urgent, port.out = [], []
    return frames


class Said:
    def __init__(self, sender: str, neighbours: set[str]) -> None:
        self.sender = sender
        self.neighbours = neighbours
        self.heard: list[str] = []
        self.acknowledged: set[str] = set()


def hub_of(member: str) -> str:
    return member[:2]


class Network(RuleBasedStateMachine):
    """What the machine does; `machine` says when."""

    edges: tuple[Edge, ...]

    def __init__(self) -> None:
        super().__init__()
        hubs = sorted({hub for edge in self.edges for hub in edge})
        self.relays = {hub: Relay(Directory(hub, Limits(), hub[0])) for hub in hubs}
        self.ports: dict[str, SessionPort] = {}
        self.numbers: dict[str, int] = {}
        self.links: dict[Edge, LinkPort] = {}
        """By hub and peer."""
        self.asked: dict[str, list[Frame]] = {}
        self.said: dict[tuple[SessionPort, int], Said] = {}
        self.by_text: dict[str, Said] = {}
        self.now = 0.0

    def receive(self, port: SessionPort | LinkPort, hub: str, frame: Frame) -> None:
        self.relays[hub].receive(port, frame, self.now)

    def do_join(self, name: str) -> None:
        hub = hub_of(name)
        if name not in self.ports:
            port = self.ports[name] = SessionPort(name, lambda: None)
            self.relays[hub]._directory.open_session(port)
            self.asked[name] = []
        flags = JoinFlag.MEMBER | JoinFlag.WATCH
        self.receive(self.ports[name], hub, Frame(Kind.JOIN, name="r", flags=flags))
        self.do_listen(name)

    def do_leave(self, name: str) -> None:
        if name in self.numbers:
            frame = Frame(Kind.LEAVE, to=self.numbers.pop(name))
            self.receive(self.ports[name], hub_of(name), frame)

    def do_crash(self, name: str) -> None:
        if name in self.ports:
            port = self.ports.pop(name)
            self.numbers.pop(name, None)
            self.relays[hub_of(name)].close(port)
            self.said = {key: said for key, said in self.said.items() if key[0] is not port}

    def do_say(self, name: str, id: int) -> None:
        if name in self.numbers and (self.ports[name], id) not in self.said:
            hub = hub_of(name)
            said = Said(name, {n for n in self.numbers if hub_of(n) == hub} - {name})
            text = f"{name} {len(self.by_text)}"
            self.said[self.ports[name], id] = self.by_text[text] = said
            frame = Frame(Kind.SAY, to=self.numbers[name], id=id, value=1000, data=text.encode())
            self.receive(self.ports[name], hub, frame)

    def do_listen(self, name: str) -> None:
        """A member reads what is there; receipts are checked."""
        if name not in self.ports:
            return
        for frame in taken(self.ports[name]):
            if frame.kind == Kind.JOIN:
                self.numbers[name] = frame.to
            elif frame.kind == Kind.SAY:
                self.asked[name].append(frame)
                self.by_text[frame.data.decode()].heard.append(name)
            elif frame.kind == Kind.RECEIPT:
                self.check(self.ports[name], frame.id, parse_receipt(frame))

    def do_acknowledge(self, name: str, last: bool) -> None:
        if name in self.ports and self.asked[name]:
            frame = self.asked[name].pop(-1 if last else 0)
            self.by_text[frame.data.decode()].acknowledged.add(name)
            self.receive(self.ports[name], hub_of(name), Frame(Kind.ACK, id=frame.id))

    def do_heal(self, edge: Edge) -> None:
        if edge in self.links:
            return
        for hub, peer in (edge, edge[::-1]):
            link = self.links[hub, peer] = LinkPort(peer, lambda: None, "", peer[0])
            self.relays[hub]._directory.open_link(link)

    def do_carry(self, edge: Edge) -> None:
        """What one hub wrote reaches the other."""
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

    def check(self, port: SessionPort, id: int, total: Sum) -> None:
        said = self.said.pop((port, id))
        fates = [*total.acknowledged, *total.failed, *total.unknown]
        assert len(fates) == len(set(fates)), "a member has one fate"
        assert said.sender not in fates
        assert said.neighbours <= set(fates), "nobody on the same hub is missing"
        assert set(total.acknowledged) <= said.acknowledged
        for name in total.unknown:
            assert hub_of(name) != hub_of(said.sender), "only a link makes a fate unknown"
        for name, reason in total.failed.items():
            if reason.cause is Cause.UNREACHABLE:
                assert name not in said.acknowledged

    @invariant()
    def there_is_one_way(self) -> None:
        assert not any(relay._directory.cuts for relay in self.relays.values())
        for said in self.by_text.values():
            assert len(said.heard) == len(set(said.heard)), "nobody hears it twice"

    @invariant()
    def nothing_is_left_when_nobody_is_there(self) -> None:
        for hub, relay in self.relays.items():
            directory = relay._directory
            assert set(directory.addressed) == {m.number for m in directory.members.values()}
            assert {port.member for port in directory.sessions} <= set(directory.members.values())
            for room in directory.rooms.values():
                assert not room.empty
                assert not set(room.lost) & {m for r in room.remote.values() for m in r}
            if not directory.members and not any(hub_of(name) == hub for name in self.ports):
                assert not directory.rooms

    def teardown(self) -> None:
        """Let all travel, let every deadline pass: nothing is pending, everyone was told."""
        for _ in range(4):
            for _ in self.edges:
                for edge in list(self.links):
                    self.do_carry(edge)
            self.do_wait(4.0)
        for name in list(self.ports):
            self.do_listen(name)
        assert self.said == {}
        assert all(relay.pending == {} for relay in self.relays.values())
        self.all_agree()

    def all_agree(self) -> None:
        """When all links are whole, every hub knows the members there are, and no others."""
        for edge in self.edges:
            self.do_cut(edge)
        for edge in self.edges:
            self.do_heal(edge)
        for _ in range(2 * len(self.edges)):
            for edge in list(self.links):
                self.do_carry(edge)
        for relay in self.relays.values():
            directory = relay._directory
            assert set(directory.members) == set(self.ports)
            assert all(directory.hubs[hub] for hub in self.relays if hub != directory.hub)
            room = directory.rooms.get("r")
            here = {m.name: c for m, c in room.members()} if room is not None else {}
            assert set(here) == set(self.numbers)
            assert room is None or not room.lost


def machine(links: tuple[Edge, ...]) -> type[Network]:
    hubs = sorted({hub for edge in links for hub in edge})
    names = st.sampled_from([hub + member for hub in hubs for member in "xy"])
    cuttable = st.sampled_from(links)
    ways = st.sampled_from([*links, *(edge[::-1] for edge in links)])

    class Machine(Network):
        edges = links
        join = rule(name=names)(lambda self, name: self.do_join(name))
        leave = rule(name=names)(lambda self, name: self.do_leave(name))
        crash = rule(name=names)(lambda self, name: self.do_crash(name))
        say = rule(name=names, id=st.integers(1, 1000))(
            lambda self, name, id: self.do_say(name, id)
        )
        listen = rule(name=names)(lambda self, name: self.do_listen(name))
        acknowledge = rule(name=names, last=st.booleans())(
            lambda self, name, last: self.do_acknowledge(name, last)
        )
        heal = rule(edge=cuttable)(lambda self, edge: self.do_heal(edge))
        carry = rule(edge=ways)(lambda self, edge: self.do_carry(edge))
        cut = rule(edge=cuttable)(lambda self, edge: self.do_cut(edge))
        wait = rule(by_s=st.floats(0.1, 1.0))(lambda self, by_s: self.do_wait(by_s))

    Machine.TestCase.settings = settings(
        max_examples=100, stateful_step_count=50, deadline=None, print_blob=False
    )
    return Machine


TestPair = machine(PAIR).TestCase
TestTree = machine(TREE).TestCase
