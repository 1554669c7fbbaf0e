"""Whatever happens in whatever order, every receipt tells the truth.

Two hubs, four members, one room; members join, leave, crash, say and acknowledge, the link is cut
and healed, frames travel when the machine lets them. Every `say` ends in exactly one receipt.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tabane.middlecon.directory import Directory
from tabane.middlecon.frames import Decoder, Frame, JoinFlag, Kind
from tabane.middlecon.receipts import Cause, Sum, parse_receipt
from tabane.middlecon.relay import Relay
from tabane.middlecon.rooms import LinkPort, Port, SessionPort
from tabane.middlecon.session import Limits

NAMES = ("a1", "a2", "b1", "b2")
names = st.sampled_from(NAMES)


def taken(port: Port) -> list[Frame]:
    frames = Decoder().feed(b"".join(port.out))
    port.out = []
    return frames


class Said:
    def __init__(self, sender: str, neighbours: set[str]) -> None:
        self.sender = sender
        self.neighbours = neighbours
        self.acknowledged: set[str] = set()


class Truth(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.relays = {hub: Relay(Directory(hub, Limits())) for hub in "ab"}
        self.ports: dict[str, SessionPort] = {}
        self.numbers: dict[str, int] = {}
        self.links: dict[str, LinkPort] = {}
        self.asked: dict[str, list[Frame]] = {}
        self.said: dict[tuple[SessionPort, int], Said] = {}
        self.now = 0.0

    def receive(self, port: SessionPort | LinkPort, hub: str, frame: Frame) -> None:
        self.relays[hub].receive(port, frame, self.now)

    @rule(name=names)
    def join(self, name: str) -> None:
        if name not in self.ports:
            port = self.ports[name] = SessionPort(name, lambda: None)
            self.relays[name[0]]._directory.open_session(port)
            self.asked[name] = []
        flags = JoinFlag.MEMBER | JoinFlag.WATCH
        self.receive(self.ports[name], name[0], Frame(Kind.JOIN, name="r", flags=flags))
        self.listen(name)

    @rule(name=names)
    def leave(self, name: str) -> None:
        if name in self.numbers:
            frame = Frame(Kind.LEAVE, to=self.numbers.pop(name))
            self.receive(self.ports[name], name[0], frame)

    @rule(name=names)
    def crash(self, name: str) -> None:
        if name in self.ports:
            port = self.ports.pop(name)
            self.numbers.pop(name, None)
            self.relays[name[0]].close(port)
            self.said = {key: said for key, said in self.said.items() if key[0] is not port}

    @rule(name=names, id=st.integers(1, 1000))
    def say(self, name: str, id: int) -> None:
        if name in self.numbers and (self.ports[name], id) not in self.said:
            neighbours = {n for n in self.numbers if n[0] == name[0]} - {name}
            self.said[self.ports[name], id] = Said(name, neighbours)
            frame = Frame(
                Kind.SAY, to=self.numbers[name], id=id, value=1000, data=f"{name} {id}".encode()
            )
            self.receive(self.ports[name], name[0], frame)

    @rule(name=names)
    def listen(self, name: str) -> None:
        """A member reads what is there; receipts are checked."""
        if name not in self.ports:
            return
        for frame in taken(self.ports[name]):
            if frame.kind == Kind.JOIN:
                self.numbers[name] = frame.to
            elif frame.kind == Kind.SAY:
                self.asked[name].append(frame)
            elif frame.kind == Kind.RECEIPT:
                self.check(self.ports[name], frame.id, parse_receipt(frame))

    @rule(name=names, last=st.booleans())
    def acknowledge(self, name: str, last: bool) -> None:
        if name in self.ports and self.asked[name]:
            frame = self.asked[name].pop(-1 if last else 0)
            sender, id = frame.data.decode().split()
            said = self.said.get((self.ports.get(sender), int(id)))
            if said is not None:
                said.acknowledged.add(name)
            self.receive(self.ports[name], name[0], Frame(Kind.ACK, id=frame.id))

    @precondition(lambda self: not self.links)
    @rule()
    def heal(self) -> None:
        for hub, peer in ("ab", "ba"):
            link = self.links[hub] = LinkPort(peer, lambda: None)
            self.relays[hub]._directory.open_link(link)

    @precondition(lambda self: self.links)
    @rule(from_hub=st.sampled_from("ab"))
    def carry(self, from_hub: str) -> None:
        to_hub = "b" if from_hub == "a" else "a"
        for frame in taken(self.links[from_hub]):
            self.receive(self.links[to_hub], to_hub, frame)

    @precondition(lambda self: self.links)
    @rule()
    def cut(self) -> None:
        links, self.links = self.links, {}
        for hub, link in links.items():
            self.relays[hub].close(link)

    @rule(by_s=st.floats(0.1, 1.0))
    def wait(self, by_s: float) -> None:
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
            assert name[0] != said.sender[0], "only a link makes a fate unknown"
        for name, reason in total.failed.items():
            if reason.cause is Cause.UNREACHABLE:
                assert name not in said.acknowledged

    @invariant()
    def nothing_is_left_when_nobody_is_there(self) -> None:
        for hub, relay in self.relays.items():
            directory = relay._directory
            assert {p.member.number for p in directory.sessions} <= set(directory.addressed)
            for room in directory.rooms.values():
                assert not room.empty
                assert not set(room.lost) & {m for r in room.remote.values() for m in r}
            if not directory.members and not any(n[0] == hub for n in self.ports):
                assert not directory.rooms

    def teardown(self) -> None:
        """Let all travel, let every deadline pass: nothing is pending, everyone was told."""
        for _ in range(3):
            if self.links:
                self.carry("a")
                self.carry("b")
            self.wait(2.0)
        for name in list(self.ports):
            self.listen(name)
        assert self.said == {}
        assert all(relay.pending == {} for relay in self.relays.values())


Truth.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestTruth = Truth.TestCase
