"""Nodes tell each other how far their replica is; one that hears nothing asks again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tabane.middlecon import StateChange
from tabane.model import NodeName
from tabane.node import messages as say
from tabane.node.lag import KEY, Lag
from tabane.supervise import Supervisor

CONTROL, HERE = NodeName("tokyo/tokyo-1"), NodeName("osaka/osaka-1")


class Later:
    """Calls that a test makes when their time has come; the earliest of a name, as the real one."""

    def __init__(self) -> None:
        self.planned: dict[str, Callable[[], None]] = {}

    def call(self, name: str, delay_s: float, action: Callable[[], None]) -> None:
        self.planned.setdefault(name, action)

    def come(self, name: str) -> None:
        self.planned.pop(name)()


class Node:
    """What `Lag` needs of an agent."""

    def __init__(self, tasks: Supervisor) -> None:
        self.tasks = tasks
        self.later = Later()
        self.config = SimpleNamespace(key=HERE, cluster=SimpleNamespace(control=CONTROL))
        self.replica = SimpleNamespace(revision=5, subscribe=self._subscribe)
        self.follower = SimpleNamespace(heard=0)
        self.room = SimpleNamespace(state={}, on_state=self._on_state)
        self.me = SimpleNamespace(state=SimpleNamespace(put=self._put))
        self.published: list[tuple[str, bytes]] = []
        self.has_published = asyncio.Event()
        self.asked: list[tuple[str, say.Message]] = []

    def _subscribe(self, callback: Callable[[Any], None]) -> None:
        self._on_update = callback

    def _on_state(self, callback: Callable[[StateChange], None]) -> None:
        self._on_told = callback

    async def _put(self, key: str, value: bytes) -> None:
        self.published.append((key, value))
        self.has_published.set()

    def tell(self, member: str, message: say.Message) -> None:
        self.asked.append((member, message))

    def take_in(self, revision: int) -> None:
        self.replica.revision = revision
        self.follower.heard += 1
        self._on_update(())

    def hear_of(self, revision: int) -> None:
        """The control node tells its revision."""
        member, value = f"{CONTROL}/agent", b"%d" % revision
        self.room.state[member] = {KEY: value}
        self._on_told(StateChange(member, KEY, value))


@pytest.fixture
def made() -> tuple[Node, Lag, Supervisor]:
    tasks = Supervisor("test")
    node = Node(tasks)
    return node, Lag(node), tasks  # type: ignore[arg-type]


async def test_a_node_tells_its_revision_once_for_many_changes(
    made: tuple[Node, Lag, Supervisor],
) -> None:
    node, _, tasks = made
    async with tasks:
        node.take_in(6)
        node.take_in(7)
        assert list(node.later.planned) == ["tell revision"]
        node.later.come("tell revision")
        await node.has_published.wait()
    assert node.published == [(KEY, b"7")]


def test_nobody_is_behind_what_was_not_told(made: tuple[Node, Lag, Supervisor]) -> None:
    node, lag, _ = made
    assert lag.behind(HERE) is lag.behind(CONTROL) is None
    node.hear_of(7)
    assert (lag.behind(HERE), lag.behind(CONTROL)) == (2, 0)
    assert lag.behind(NodeName("kobe/kobe-1")) is None
    node.take_in(9)
    assert lag.behind(HERE) == 0


def test_who_hears_nothing_asks_again_until_it_has_all(made: tuple[Node, Lag, Supervisor]) -> None:
    node, _, _ = made
    node.hear_of(7)
    for times in (1, 2):
        node.later.come("lag")
        assert node.asked == [(f"{CONTROL}/agent", say.StoreFollow(5))] * times
    node.take_in(7)
    node.later.come("lag")
    assert len(node.asked) == 2
    assert "lag" not in node.later.planned


def test_who_hears_something_waits_for_the_rest(made: tuple[Node, Lag, Supervisor]) -> None:
    node, _, _ = made
    node.hear_of(9)
    node.take_in(6)
    node.later.come("lag")
    assert node.asked == []
    node.later.come("lag")
    assert node.asked == [(f"{CONTROL}/agent", say.StoreFollow(6))]
