"""Whatever happens in whatever order, every receipt tells the truth.

Members of the network say and acknowledge. Every `say` ends in exactly one receipt.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule
from tests.middlecon.network import PAIR, TREE, Network, hub_of, machine

from tabane.middlecon.frames import Frame, Kind
from tabane.middlecon.ports import SessionPort
from tabane.middlecon.receipts import Cause, Sum, parse_receipt


class Said:
    def __init__(self, sender: str, neighbours: set[str]) -> None:
        self.sender = sender
        self.neighbours = neighbours
        self.heard: list[str] = []
        self.acknowledged: set[str] = set()


class Saying(Network):
    def __init__(self) -> None:
        super().__init__()
        self.said: dict[tuple[SessionPort, int], Said] = {}
        self.by_text: dict[str, Said] = {}

    def on_crash(self, port: SessionPort) -> None:
        self.said = {key: said for key, said in self.said.items() if key[0] is not port}

    def on_frame(self, name: str, frame: Frame) -> None:
        if frame.kind == Kind.SAY:
            self.inbox[name].append(frame)
            self.by_text[frame.data.decode()].heard.append(name)
        elif frame.kind == Kind.RECEIPT:
            self.check(self.ports[name], frame.id, parse_receipt(frame))

    def do_say(self, name: str, id: int) -> None:
        if name in self.numbers and (self.ports[name], id) not in self.said:
            hub = hub_of(name)
            said = Said(name, {n for n in self.numbers if hub_of(n) == hub} - {name})
            text = f"{name} {len(self.by_text)}"
            self.said[self.ports[name], id] = self.by_text[text] = said
            frame = Frame(Kind.SAY, to=self.numbers[name], id=id, value=1000, data=text.encode())
            self.answer(name, frame)

    def do_acknowledge(self, name: str, last: bool) -> None:
        if name in self.ports and self.inbox[name]:
            frame = self.inbox[name].pop(-1 if last else 0)
            self.by_text[frame.data.decode()].acknowledged.add(name)
            self.answer(name, Frame(Kind.ACK, id=frame.id))

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
    def nobody_hears_it_twice(self) -> None:
        for said in self.by_text.values():
            assert len(said.heard) == len(set(said.heard))

    def teardown(self) -> None:
        """Let all travel, let every deadline pass: nothing is pending, everyone was told."""
        for _ in range(4):
            self.carry_all()
            self.do_wait(4.0)
        for name in list(self.ports):
            self.do_listen(name)
        assert self.said == {}
        assert all(relay.pending == {} for relay in self.relays.values())
        self.all_agree()

    def all_agree(self) -> None:
        """When all links are whole, every hub knows the members there are, and no others."""
        self.link_anew()
        for relay in self.relays.values():
            directory = relay._directory
            assert set(directory.members) == set(self.ports)
            assert all(directory.hubs[hub] for hub in self.relays if hub != directory.hub)
            room = directory.rooms.get("r")
            here = {m.name: c for m, c in room.members()} if room is not None else {}
            assert set(here) == set(self.numbers)
            assert room is None or not room.lost


def rules(names):
    return {
        "do_say": rule(name=names, id=st.integers(1, 1000)),
        "do_acknowledge": rule(name=names, last=st.booleans()),
    }


TestPair = machine(Saying, PAIR, rules)
TestTree = machine(Saying, TREE, rules)
