"""Frozen instances: when, for whom they are thawed, and every order in which words may arrive."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace

from tabane.gateway import activation
from tabane.gateway.activation import InstanceAwake, NodeReport
from tabane.gateway.grants import Grants, Lease
from tabane.gateway.messages import Grant, Revoke, ToGateway
from tabane.model import InstanceId, State
from tabane.testing.home import NODE, Decided, HandledHome

I1 = InstanceId("i1")
FREEZE_S, STOP_S = 1.0, 10.0


def rested(**reactive: object) -> HandledHome:
    """`i1` is ready, and nobody holds a slot of it."""
    limits = {"freeze_after_s": FREEZE_S, "stop_after_s": STOP_S, **reactive}
    home = HandledHome(**limits)
    home.demand("g1", 1)
    home.ready("i1")
    home.returned("g1", "i1", 1)
    return home


def frozen(**reactive: object) -> HandledHome:
    home = rested(**reactive)
    assert home.wait(FREEZE_S).freezes == [I1]
    return home


def awake(home: HandledHome, number: int = 1) -> Decided:
    return home.handle(InstanceAwake(home.app.key, I1, number))


def report(home: HandledHome, state: State, asked_at: float, freezes: int = 1) -> Decided:
    found = home.instance("i1", state, freezes=freezes)
    return home.handle(NodeReport(NODE, (found,), asked_at))


def test_what_no_session_used_is_frozen_and_later_stopped() -> None:
    home = rested()
    assert home.wait(FREEZE_S - 0.1) == []
    assert home.wait(0.1).freezes == [I1]
    assert home.wait(STOP_S - FREEZE_S - 0.1) == []
    assert home.wait(0.1).stops == {I1: "idle for 10 s"}


def test_without_freeze_after_or_an_engine_that_can_nothing_is_frozen() -> None:
    assert rested(freeze_after_s=None).wait(STOP_S - 0.1) == []
    home = rested()
    home.ready("i1")
    home.ledger.instances[I1].instance = replace(home.instance("i1"), freezable=False)
    assert home.wait(STOP_S - 0.1).freezes == []


def test_who_holds_slots_is_asked_for_them_first() -> None:
    home = rested()
    home.demand("g1", 1)
    decided = home.wait(FREEZE_S)
    assert (decided.revokes, decided.freezes) == ([("g1", "i1", FREEZE_S)], [])
    home.still_used("g1", "i1", 0.4)
    assert home.wait(FREEZE_S - 0.5).freezes == []
    home.wait(0.2)
    assert home.returned("g1", "i1", 1, FREEZE_S).freezes == [I1]


def test_a_session_has_it_thawed_and_is_granted_a_slot_at_once() -> None:
    home = frozen()
    decided = home.demand("g1", 2)
    assert [type(one) for one in decided] == [activation.Thaw, activation.Tell]
    assert decided.thaws == [I1]
    ((_, grant),) = decided.told(Grant)
    assert grant.trace is not None
    assert (grant.slots, grant.trace.option) == (2, "thaw")
    ((_, later),) = home.demand("g2", 1).told(Grant)
    assert later.trace is None


def test_a_slot_of_one_that_runs_comes_first_and_a_start_last() -> None:
    home = HandledHome(freeze_after_s=FREEZE_S, stop_after_s=STOP_S, concurrency=1, max=3)
    home.demand("g1", 2)
    home.ready("i1")
    home.ready("i2")
    home.returned("g1", "i1", 1)
    home.still_used("g1", "i2", -5.0)
    assert home.wait(FREEZE_S).freezes == [I1]
    home.returned("g1", "i2", 1)
    assert home.demand("g2", 1).grants == [("g2", "i2", 1)]
    assert home.demand("g3", 1).thaws == [I1]
    assert Decided(home.demand("g4", 1) + home.wait(0.2)).starts == ["i3"]


def test_what_is_kept_may_be_frozen() -> None:
    home = rested()
    home.handle(activation.FloorChanged(home.app.key, 1))
    assert home.wait(FREEZE_S).freezes == [I1]
    assert home.wait(100 * STOP_S) == []
    assert home.demand("g1", 1).thaws == [I1]


@pytest.mark.parametrize("age_s", [5.0])
def test_what_is_too_old_is_stopped_without_being_thawed_first(age_s: float) -> None:
    home = frozen(max_age_s=age_s)
    decided = home.wait(age_s)
    assert (list(decided.stops), decided.thaws) == ([I1], [])


def test_one_of_an_old_revision_serves_until_the_new_one_is_ready() -> None:
    home = frozen()
    assert home.redeploy().starts == ["i2"]
    assert home.demand("g1", 1).thaws == [I1]
    assert home.ready("i2").revokes == [("g1", "i1", None)]


def test_what_is_above_max_is_taken_of_the_frozen_first() -> None:
    home = HandledHome(freeze_after_s=FREEZE_S, stop_after_s=STOP_S, concurrency=1, max=2)
    home.demand("g1", 2)
    home.ready("i1")
    home.ready("i2")
    home.returned("g1", "i1", 1)
    home.wait(FREEZE_S)
    assert list(home.deploy(max=1).stops) == ["i1"]


# What a node says


def test_one_that_a_person_uses_is_frozen_again_later() -> None:
    home = frozen()
    assert awake(home) == []
    assert home.wait(FREEZE_S - 0.1) == []
    assert home.wait(0.2).freezes == [I1]
    assert home.ledger.instances[I1].freezes == 2


def test_an_answer_to_an_earlier_order_says_nothing_of_the_latest() -> None:
    home = frozen()
    home.demand("g1", 1)
    home.returned("g1", "i1", 1)
    assert home.wait(FREEZE_S).freezes == [I1]
    awake(home, 1)
    assert home.demand("g1", 1).thaws == [I1], "it froze by the second order"


def test_a_thaw_that_was_lost_is_told_again() -> None:
    home = frozen()
    home.demand("g1", 1)
    home.wait(0.1)
    assert report(home, State.FROZEN, home.now).thaws == [I1]


def test_a_report_from_before_the_latest_order_says_nothing_of_it() -> None:
    home = rested()
    asked_at = home.now
    home.wait(FREEZE_S)
    assert report(home, State.READY, asked_at) == []
    assert home.demand("g1", 1).thaws == [I1]
    home = frozen()
    asked_at = home.now
    home.wait(0.1)
    assert home.demand("g1", 1).thaws == [I1]
    assert report(home, State.FROZEN, asked_at) == []


def test_the_next_home_finds_frozen_ones_and_counts_its_orders_on() -> None:
    home = frozen()
    home.restart()
    home.deploy()
    home.wait(1)
    assert report(home, State.FROZEN, home.now, freezes=7).starts == []
    assert home.demand("g1", 1).thaws == [I1]
    home.returned("g1", "i1", 1)
    home.wait(FREEZE_S)
    assert home.ledger.instances[I1].freezes == 8


def test_what_a_gateway_holds_slots_of_is_thawed_by_the_next_home() -> None:
    home = frozen()
    home.restart()
    home.deploy()
    home.handle(activation.GatewayJoined("g1"))
    home.wait(1)
    report(home, State.FROZEN, home.now)
    assert home.report("g1", i1=1).thaws == [I1]


# Every order


class Race:
    """A home, a node and a gateway, whose words to each other arrive when `choose` says so: of so
    many channels with something in them, and the next of `acts`."""

    def __init__(self, acts: tuple[str, ...], choose: Callable[[int], int]) -> None:
        self.home = HandledHome(freeze_after_s=FREEZE_S, stop_after_s=1000.0, concurrency=1, max=1)
        self.acts, self.choose = deque(acts), choose
        self.state, self.freezes = State.READY, 0
        self.grants: Grants[str] = Grants()
        self.running: list[Lease] = []
        self.to_node: deque[object] = deque()
        self.to_home: deque[object] = deque()
        self.to_gateway: deque[ToGateway] = deque()
        self.from_gateway: deque[object] = deque()
        self.home.demand("g1", 1)
        self.home.ready("i1")
        self.home.returned("g1", "i1", 1)
        self.home.epoch = 0

    def run(self) -> None:
        while ready := [way for way in self.ways() if way]:
            ready[self.choose(len(ready))]()

    def ways(self) -> Iterator[Callable[[], None] | None]:
        yield self.act if self.acts else None
        yield self.deliver_to_node if self.to_node else None
        yield self.deliver_to_home if self.to_home else None
        yield self.deliver_to_gateway if self.to_gateway else None
        yield self.deliver_from_gateway if self.from_gateway else None

    def act(self) -> None:
        getattr(self, f"do_{self.acts.popleft()}")()

    def perform(self, decided: Decided) -> None:
        for one in decided:
            if isinstance(one, activation.Tell):
                self.to_gateway.append(one.message)
            else:
                self.to_node.append(one)

    # What happens

    def do_session(self) -> None:
        if (lease := self.grants.take(self.home.app.key, self.home.now)) is not None:
            self.running.append(lease)
        else:
            self.from_gateway.append(
                self.grants.wait(self.home.app.key, f"s{len(self.acts)}", 9, self.home.now)
            )

    def do_end(self) -> None:
        if self.running and self.state is State.READY:
            served, messages = self.grants.release(self.running.pop(), self.home.now)
            self.running += [lease for _, lease in served]
            self.from_gateway += messages

    def do_idle(self) -> None:
        self.perform(self.home.wait(FREEZE_S + 0.2))

    def do_use(self) -> None:
        """A person does something inside, for a moment."""
        if self.state is State.FROZEN:
            self.state = State.READY
            self.to_home.append(InstanceAwake(self.home.app.key, I1, self.freezes))

    def do_refuse(self) -> None:
        """The engine cannot freeze it, this once."""
        self.refuses = True

    refuses = False

    def do_ask(self) -> None:
        self.home.now += 0.001
        self.to_node.append(self.home.now)
        self.home.now += 0.001

    def do_lose(self) -> None:
        """The node's session breaks; when it is back, it is asked what it has."""
        self.to_node.clear()
        self.do_ask()

    # What arrives

    def deliver_to_node(self) -> None:
        match self.to_node.popleft():
            case activation.Freeze(number=number):
                self.freezes = number
                if self.refuses:
                    self.refuses = False
                    self.to_home.append(InstanceAwake(self.home.app.key, I1, number))
                else:
                    comes = any(isinstance(one, activation.Thaw) for one in self.to_node)
                    assert comes or not self.running, "it is frozen under a session"
                    self.state = State.FROZEN
            case activation.Thaw():
                self.state = State.READY
            case float(asked_at):
                found = self.home.instance("i1", self.state, freezes=self.freezes)
                self.to_home.append(NodeReport(NODE, (found,), asked_at))

    def deliver_to_home(self) -> None:
        event = self.to_home.popleft()
        assert isinstance(event, activation.Event)
        self.perform(self.home.handle(event))

    def deliver_to_gateway(self) -> None:
        message = self.to_gateway.popleft()
        if isinstance(message, Grant):
            served, answers = self.grants.on_grant(message, self.home.now)
            self.running += [lease for _, lease in served]
        else:
            assert isinstance(message, Revoke)
            answers = self.grants.on_revoke(message, self.home.now)
        self.from_gateway += answers

    def deliver_from_gateway(self) -> None:
        self.perform(self.home.hear("g1", self.from_gateway.popleft()))  # type: ignore[arg-type]

    def check(self) -> None:
        assert self.state is State.READY or not self.running, "a session waits in a frozen one"
        waiting = self.grants.demand(self.home.app.key, self.home.now).waiting
        assert not waiting or self.running, "a session waits for nothing"
        told = self.home.ledger.instances[I1].state
        assert told is State.FROZEN or self.state is State.READY, "its home takes it for awake"


def every_order(acts: tuple[str, ...]) -> Iterator[Race]:
    """All races that there are with these acts, by going back to the last choice that has another
    way, again and again."""
    taken: list[int] = []
    counts: list[int] = []
    while True:
        step = itertools.count()

        def choose(count: int, step: Iterator[int] = step) -> int:
            at = next(step)
            if at == len(taken):
                taken.append(0)
                counts.append(count)
            return taken[at]

        race = Race(acts, choose)
        race.run()
        yield race
        while taken and taken[-1] + 1 == counts[-1]:
            taken.pop()
            counts.pop()
        if not taken:
            return
        taken[-1] += 1


ACTS = ("session", "end", "idle", "use", "refuse", "ask", "lose")


@pytest.mark.parametrize("first", ["idle", "session"])
@pytest.mark.parametrize("second", ACTS)
def test_no_order_of_words_loses_a_session_or_freezes_under_one(first: str, second: str) -> None:
    races = 0
    for rest in (*itertools.product(ACTS), ("use", "session"), ("idle", "use")):
        for race in every_order((first, second, *rest)):
            races += 1
            race.check()
    assert races > 20
