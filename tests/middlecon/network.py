"""Hubs, members and links for state machines: whatever happens, in whatever order.

Two hubs, or five in three data centers, with two members each, and one room. Members join, leave
and crash, links are cut and healed, and frames travel when the machine lets them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.middlecon.conftest import taken

from tabane.middlecon.directory import Directory
from tabane.middlecon.frames import CHANGES, Change, Decoder, Frame, Kind
from tabane.middlecon.ports import LinkPort, SessionPort
from tabane.middlecon.relay import Relay
from tabane.middlecon.session import Limits
from tabane.middlecon.tallies import Tally

Edge = tuple[str, str]
PAIR: tuple[Edge, ...] = (("a1", "b1"),)
TREE: tuple[Edge, ...] = (("a1", "a2"), ("b1", "b2"), ("a1", "b1"), ("b2", "c1"))
"""Hubs of one data center begin with the same letter."""

Rules = Callable[[st.SearchStrategy[str]], dict[str, Any]]


def parse_one(data: bytes) -> Frame:
    (frame,) = Decoder().feed(data)
    return frame


def hub_of(member: str) -> str:
    return member[:2]


class Network(RuleBasedStateMachine):
    """What happens; `machine` says when. Those who build on it say what members do with frames."""

    edges: tuple[Edge, ...]

    def __init__(self) -> None:
        super().__init__()
        hubs = sorted({hub for edge in self.edges for hub in edge})
        self.relays = {hub: Relay(Directory(hub, Limits(), hub[0]), "1") for hub in hubs}
        self.ports: dict[str, SessionPort] = {}
        self.numbers: dict[str, int] = {}
        """Of the room, for its members."""
        self.links: dict[Edge, LinkPort] = {}
        """By hub and peer."""
        self.inbox: dict[str, list[Frame]] = {}
        """What each member has to answer."""
        self.now = 0.0

    def called(self, name: str) -> str:
        """The name that a member gives to its hub."""
        return name

    def on_frame(self, name: str, frame: Frame) -> None:
        """A member reads a frame."""

    def on_crash(self, port: SessionPort) -> None:
        """A session is about to end."""

    def receive(self, port: SessionPort | LinkPort, hub: str, frame: Frame) -> None:
        self.relays[hub].receive(port, frame, self.now)

    def answer(self, name: str, frame: Frame) -> None:
        self.receive(self.ports[name], hub_of(name), frame)

    def do_join(self, name: str) -> None:
        if name not in self.ports:
            port = self.ports[name] = SessionPort(self.called(name), lambda: None)
            self.relays[hub_of(name)]._directory.open_session(port)
            self.inbox[name] = []
        self.answer(name, Frame(Kind.JOIN, name="r", flags=3))
        self.do_listen(name)

    def do_leave(self, name: str) -> None:
        if name in self.numbers:
            self.answer(name, Frame(Kind.LEAVE, to=self.numbers.pop(name)))

    def do_crash(self, name: str) -> None:
        if name in self.ports:
            port = self.ports.pop(name)
            self.numbers.pop(name, None)
            self.on_crash(port)
            self.relays[hub_of(name)].close(port)

    def do_listen(self, name: str) -> None:
        """A member reads what is there."""
        if name in self.ports:
            for frame in taken(self.ports[name]):
                if frame.kind == Kind.JOIN:
                    self.numbers[name] = frame.to
                else:
                    self.on_frame(name, frame)

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
            relay.check(self.now)

    def carry_all(self, times: int = 1) -> None:
        """Everything that has been written gets everywhere."""
        for _ in range(times * len(self.edges)):
            for edge in list(self.links):
                self.do_carry(edge)

    def link_anew(self) -> None:
        """All links are whole, and have told everything."""
        for edge in self.edges:
            self.do_cut(edge)
        for edge in self.edges:
            self.do_heal(edge)
        self.carry_all(2)

    @invariant()
    def there_is_one_way(self) -> None:
        assert not any(relay._directory.cuts for relay in self.relays.values())

    @invariant()
    def nothing_is_left_when_nobody_is_there(self) -> None:
        for hub, relay in self.relays.items():
            directory = relay._directory
            assert set(directory.addressed) == {m.number for m in directory.members.values()}
            assert {port.member for port in directory.sessions} <= set(directory.members.values())
            for room in directory.rooms.values():
                assert not room.empty
                assert not set(room.lost) & {m for r in room.remote.values() for m in r}
                told = {f.name: CHANGES[f.flags] for f in map(parse_one, room.presences.values())}
                assert {n: c is not Change.UNKNOWN for n, c in told.items()} == {
                    m.name: c is not Change.UNKNOWN for m, c in room.members()
                }, "who joins is told of all"
            if not directory.members and not any(hub_of(name) == hub for name in self.ports):
                assert not directory.rooms

    @invariant()
    def nobody_waits_for_a_session_that_ended(self) -> None:
        for relay in self.relays.values():
            for one in relay.pending.values():
                if isinstance(one, Tally):
                    waited = {p for p in (*one._waiting, one._origin) if isinstance(p, SessionPort)}
                    assert waited <= set(relay._directory.sessions)


def machine(network: type[Network], links: tuple[Edge, ...], more: Rules) -> Any:
    """A machine of these links, and the rules that `more` makes for the members' names."""
    hubs = sorted({hub for edge in links for hub in edge})
    names = st.sampled_from([hub + member for hub in hubs for member in "xy"])
    ways = st.sampled_from([*links, *(edge[::-1] for edge in links)])
    rules = {
        "do_join": rule(name=names),
        "do_leave": rule(name=names),
        "do_crash": rule(name=names),
        "do_listen": rule(name=names),
        "do_heal": rule(edge=st.sampled_from(links)),
        "do_carry": rule(edge=ways),
        "do_cut": rule(edge=st.sampled_from(links)),
        "do_wait": rule(by_s=st.floats(0.1, 1.0)),
        **more(names),
    }
    made = {name: decorate(getattr(network, name)) for name, decorate in rules.items()}
    one = type(f"{network.__name__}Machine", (network,), {"edges": links, **made})
    one.TestCase.settings = settings(
        max_examples=100, stateful_step_count=50, deadline=None, print_blob=False
    )
    return one.TestCase
