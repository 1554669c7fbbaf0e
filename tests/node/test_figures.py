"""What a node tells of itself for placement."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tabane.model import NodeName
from tabane.node.figures import LOOK_S, WORTH_BYTES, Figures
from tabane.scheduler.placement import NodeView
from tabane.supervise import Supervisor
from tabane.testing import VirtualClock

MIB = 1 << 20


class Instances(tuple[()]):
    """None, and nobody is limited."""

    admission = SimpleNamespace(accounts=dict)


class Machine:
    """A node of straw, whose memory a test sets, and what it told."""

    def __init__(self) -> None:
        self.available_mib = 1000
        self.idle_mib = 0
        self.told: list[NodeView] = []
        self.looked = asyncio.Event()
        self.clock = VirtualClock()
        self.me = SimpleNamespace(connected=True, state=SimpleNamespace(put=self._put))
        agent: Any = SimpleNamespace(
            clock=self.clock,
            me=self.me,
            executor=Instances(),
            engines=SimpleNamespace(view=self._view),
            pressure=self,
        )
        self.figures = Figures(agent)

    async def _put(self, key: str, value: bytes) -> None:
        assert key == "node"
        self.told.append(msgspec.msgpack.decode(value, type=NodeView))

    def free_bytes(self) -> int:
        asyncio.get_running_loop().call_soon(self.looked.set)
        return self.available_mib * MIB

    def idle_bytes(self) -> int:
        return self.idle_mib * MIB

    def _view(self, instances: int, available: int) -> NodeView:
        return NodeView(NodeName("a/b"), instances=instances, memory_available_bytes=available)

    async def look(self) -> None:
        """Once more, after the next pause."""
        await asyncio.sleep(0)
        self.looked.clear()
        self.clock.advance(LOOK_S)
        await self.looked.wait()


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    machine = Machine()
    async with Supervisor("test") as tasks:
        tasks.start("watch", machine.figures.watch())
        yield machine


async def test_the_memory_that_is_available_is_told(machine: Machine) -> None:
    await machine.figures.tell()
    assert [view.memory_available_bytes for view in machine.told] == [1000 * MIB]


async def test_it_is_told_again_when_it_is_worth_it(machine: Machine) -> None:
    await machine.figures.tell()
    for step in (WORTH_BYTES // MIB - 1, 1):  # a little, and then a little more
        machine.available_mib -= step
        await machine.look()
    assert [view.memory_available_bytes for view in machine.told] == [1000 * MIB, 936 * MIB]


async def test_what_idle_instances_would_free_is_told_too(machine: Machine) -> None:
    await machine.figures.tell()
    machine.idle_mib = 100
    await machine.look()
    assert [view.memory_idle_bytes for view in machine.told] == [0, 100 * MIB]


async def test_without_a_session_it_is_told_later(machine: Machine) -> None:
    await machine.figures.tell()
    machine.me.connected = False
    machine.available_mib = 100
    await machine.look()
    assert len(machine.told) == 1
    machine.me.connected = True
    await machine.look()
    assert machine.told[-1].memory_available_bytes == 100 * MIB
