"""Limits of instances as their sessions come and go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from msgspec.structs import replace

from tabane.errors import NotFound
from tabane.model import (
    App,
    Generation,
    Instance,
    InstanceId,
    NodeName,
    Reactive,
    Resources,
    State,
)
from tabane.node import following_resources
from tabane.node.following_resources import FollowingResources
from tabane.node.records import Record
from tabane.node.running import Running
from tabane.runtimes.api import Image
from tabane.runtimes.fake import FakeDriver
from tabane.scheduler.shares import HOLD_S
from tabane.supervise import Supervisor
from tabane.testing import VirtualClock

ID = InstanceId("i1")
RESOURCES = Resources(cpu=1.0, cpu_min=0.2, memory_bytes=256 << 20, memory_min_bytes=64 << 20)
APP = App("web", "host", port=80, resources=RESOURCES, reactive=Reactive(concurrency=4))


class FakeCgroup:
    """Says what was written, in tenths of a CPU and MiB."""

    written: ClassVar[list[tuple[str, int]]] = []
    is_gone = False

    def __init__(self, path: str) -> None:
        assert path == "/tabane/i1"

    def limit(self, limits: dict[str, float]) -> None:
        if self.is_gone:
            raise NotFound("there is no cgroup")
        self.written.append(("cpu", round(limits["cpu"] * 10)))

    def soften(self, memory_bytes: int) -> None:
        self.written.append(("memory", memory_bytes >> 20))


class Node:
    def __init__(self, tasks: Supervisor) -> None:
        self.clock, self.tasks = VirtualClock(), tasks
        generation = Generation("one", ID, 1)
        instance = Instance(ID, APP.key, 1, NodeName("here/here-1"), generation, State.READY)
        instance = replace(instance, cgroup="/tabane/i1")
        self.running = Running(Record(instance, APP, Image("host", Path("/"))), FakeDriver())
        executor = SimpleNamespace(running={ID: self.running})
        agent: Any = SimpleNamespace(clock=self.clock, tasks=tasks, executor=executor)
        self.resources = FollowingResources(agent)

    async def written(self) -> list[tuple[str, int]]:
        """Since the last look, once all tasks have ended."""
        while len(self.tasks):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        written = FakeCgroup.written[:]
        FakeCgroup.written.clear()
        return written


@pytest.fixture
async def node(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    monkeypatch.setattr(following_resources, "Cgroup", FakeCgroup)
    monkeypatch.setattr(FakeCgroup, "written", [])
    monkeypatch.setattr(FakeCgroup, "is_gone", False)
    async with Supervisor("test") as tasks:
        made = Node(tasks)
        made.resources.follow(ID, State.READY, made.running)
        yield made


async def test_they_fall_when_nobody_comes_and_rise_with_who_does(node: Node) -> None:
    assert await node.written() == [("cpu", 10), ("memory", 256)]
    node.clock.advance(HOLD_S)
    assert await node.written() == [("cpu", 2), ("memory", 64)]
    node.resources.hear("g1", ID, 1)
    assert await node.written() == [("cpu", 4), ("memory", 112)]
    node.resources.hear("g2", ID, 3)
    assert await node.written() == [("cpu", 10), ("memory", 256)]
    node.resources.on_gateway_gone("g2")
    assert await node.written() == []
    node.clock.advance(HOLD_S)
    assert await node.written() == [("cpu", 4), ("memory", 112)]


async def test_a_timer_that_is_early_is_no_end_of_it(node: Node) -> None:
    await node.written()
    share = node.resources._shares[ID]
    assert share.lower_at is not None
    share.lower_at += 0.001
    node.clock.advance(HOLD_S + 0.01)
    assert await node.written() == [("cpu", 2), ("memory", 64)]


async def test_what_is_at_work_without_sessions_has_all(node: Node) -> None:
    await node.written()
    node.clock.advance(HOLD_S)
    await node.written()
    with node.resources.in_use(ID), node.resources.in_use(ID):
        assert await node.written() == [("cpu", 10), ("memory", 256)]
    node.clock.advance(HOLD_S)
    assert await node.written() == [("cpu", 2), ("memory", 64)]


async def test_what_was_ordered_stands(node: Node) -> None:
    await node.written()
    node.running.record = replace(node.running.record, ordered=RESOURCES)
    node.clock.advance(HOLD_S)
    node.resources.hear("g1", ID, 4)
    assert await node.written() == []


async def test_what_has_ended_is_left_alone(node: Node) -> None:
    await node.written()
    FakeCgroup.is_gone = True
    node.clock.advance(HOLD_S)
    assert await node.written() == []
    FakeCgroup.is_gone = False
    node.running.stopping = True
    node.resources.follow(ID, State.STOPPING, None)
    node.resources.hear("g1", ID, 4)
    node.clock.advance(HOLD_S)
    assert await node.written() == []


async def test_the_latest_is_what_is_set_in_the_end(node: Node) -> None:
    """While one is written, others come."""
    await node.written()
    node.clock.advance(HOLD_S)
    for count in (1, 2, 3):
        node.resources.hear("g1", ID, count)
    assert (await node.written())[-2:] == [("cpu", 8), ("memory", 208)]


async def test_sessions_may_be_told_of_before_it_is_known_to_be_ready(node: Node) -> None:
    node.resources.follow(ID, State.ABSENT, None)
    node.resources.hear("g1", ID, 2)
    node.resources.follow(ID, State.READY, node.running)
    node.clock.advance(HOLD_S)
    assert (await node.written())[-2:] == [("cpu", 6), ("memory", 160)]


async def test_an_app_that_says_nothing_of_it_is_not_touched(node: Node) -> None:
    await node.written()
    plain = replace(APP, resources=Resources())
    other = replace(node.running.record.instance, id=InstanceId("i2"))
    running = Running(replace(node.running.record, app=plain, instance=other), FakeDriver())
    node.resources.follow(InstanceId("i2"), State.READY, running)
    node.clock.advance(HOLD_S)
    node.resources.hear("g1", InstanceId("i2"), 4)
    assert [what for what in await node.written() if what == ("cpu", 10)] == []
