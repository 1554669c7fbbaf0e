"""A floor is kept once all that run can have been told, and no later than in a few seconds."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tabane.model import NodeName
from tabane.node.settling import LONGEST_S, SETTLE_S, Settling
from tabane.testing import VirtualClock
from tabane.testing.clock import VirtualTimer

HERE, NEAR, OTHER = (NodeName(f"tokyo/tokyo-{number}") for number in (1, 2, 3))


class Later:
    """As `tabane.supervise.Later`, in virtual time."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._due: dict[str, tuple[float, VirtualTimer]] = {}

    def call(self, name: str, delay_s: float, action: Callable[[], None]) -> None:
        when = self._clock.now() + delay_s
        if (known := self._due.get(name)) is not None:
            if known[0] <= when:
                return
            known[1].cancel()
        self._due[name] = (when, self._clock.call_at(when, lambda: self._do(name, action)))

    def _do(self, name: str, action: Callable[[], None]) -> None:
        del self._due[name]
        action()


class Node:
    """What settling needs of an agent; `applied`: when floors were."""

    def __init__(self) -> None:
        self.clock = VirtualClock(now=0.0)
        self.later = Later(self.clock)
        self.config = SimpleNamespace(key=HERE)
        self.live = [HERE, NEAR, OTHER]
        self.nodes = SimpleNamespace(neighbours=lambda: self.live)
        self.applied: list[float] = []
        apply = lambda: self.applied.append(self.clock.now())  # noqa: E731
        self.catalog = SimpleNamespace(apply_floors=apply)
        self.settling = Settling(self)  # type: ignore[arg-type]
        self.settling.begin()

    def report(self, *nodes: NodeName) -> None:
        for node in nodes:
            self.settling.on_report(node, self.clock.now())


@pytest.fixture
def node() -> Node:
    return Node()


def test_all_that_said_so_at_once_are_given_a_moment(node: Node) -> None:
    node.report(HERE, NEAR, OTHER)
    node.clock.advance(60)
    assert node.applied == [SETTLE_S]
    assert node.settling.is_over


def test_an_agent_that_is_just_starting_again_is_waited_for(node: Node) -> None:
    node.report(HERE, NEAR)
    node.clock.advance(3)
    assert node.applied == []
    node.report(OTHER)
    node.clock.advance(0)
    assert node.applied == [3]


def test_one_that_says_nothing_is_waited_for_only_so_long(node: Node) -> None:
    node.report(NEAR)
    node.clock.advance(60)
    assert node.applied == [LONGEST_S]


def test_a_node_that_went_is_not_waited_for(node: Node) -> None:
    node.report(NEAR)
    node.clock.advance(2)
    node.live = [HERE, NEAR]
    node.settling.begin()
    node.report(NEAR)
    node.clock.advance(60)
    assert node.applied == [2 + SETTLE_S]


def test_what_was_asked_before_is_not_enough(node: Node) -> None:
    node.clock.advance(0.5)
    node.settling.begin()
    node.settling.on_report(NEAR, asked_at=0.0)
    node.report(OTHER)
    node.clock.advance(60)
    assert node.applied == [LONGEST_S]


def test_nodes_that_come_and_go_all_the_time_do_not_put_it_off(node: Node) -> None:
    for _ in range(10):
        node.settling.begin()
        node.clock.advance(0.9)
    assert node.applied == [LONGEST_S]
    node.report(NEAR, OTHER)
    node.clock.advance(60)
    assert len(node.applied) == 2
