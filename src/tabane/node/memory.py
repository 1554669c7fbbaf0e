"""What an agent gives the pressure policy: the node's memory, and who is to be asked and told."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from tabane.clock import Clock
from tabane.errors import TabaneError
from tabane.gateway.activation import LowerAsked
from tabane.gateway.uses import InUse
from tabane.k2i.host import HostReader
from tabane.node import messages as say
from tabane.node.config import agent_of
from tabane.node.pressure import Around, Memory, Pressure
from tabane.node.running import Running
from tabane.runtimes.cgroups import Cgroup, MemoryUse

if TYPE_CHECKING:
    from tabane.node.agent import Agent

log = logging.getLogger(__name__)

USES_TIMEOUT_S = 1.0
FRESH_S = 0.01
"""One wake asks for it when it is placed and when it is let in."""


class NodeMemory:
    """The machine's; or, when the node's instances were given `limit_bytes` of it, what is left of
    those. Their processes are all that is in the node's cgroup."""

    def __init__(self, host: HostReader, cgroup: str, limit_bytes: int, clock: Clock) -> None:
        self._host, self._limit_bytes = host, limit_bytes
        self._cgroup, self._clock = cgroup, clock
        self._told: Memory | None = None
        self._told_at = 0.0

    def read(self) -> Memory:
        """Not older than `FRESH_S`."""
        now = self._clock.now()
        if self._told is None or now >= self._told_at + FRESH_S:
            self._told, self._told_at = self._read(), now
        return self._told

    def _read(self) -> Memory:
        told = self._host.memory()
        memory = Memory(told.total_kib << 10, told.available_kib << 10, told.swap_free_kib << 10)
        if not self._limit_bytes:
            return memory
        left = max(0, self._limit_bytes - Cgroup(self._cgroup).memory_use().held_bytes)
        return memory._replace(
            capacity_bytes=min(memory.capacity_bytes, self._limit_bytes),
            available_bytes=min(memory.available_bytes, left),
        )

    def stalled_percent(self) -> float:
        """Of the last ten seconds nothing could run, as all waited for memory; 0 where the kernel
        does not tell."""
        pressure = self._host.pressure("memory")
        return pressure.full.avg10 if pressure is not None and pressure.full is not None else 0.0


class _Around:
    """See `Around`."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        config = agent.config
        self._memory = NodeMemory(agent.k2i.host, config.cgroup, config.memory_bytes, agent.clock)
        self.memory, self.stalled_percent = self._memory.read, self._memory.stalled_percent

    async def uses(self) -> list[InUse]:
        """Of all gateways here; what one that does not answer holds it is asked for before
        anything goes."""
        members = self._agent.nodes.gateways() & self._agent.room.members.keys()
        told = await asyncio.gather(*map(self._ask, sorted(members)))
        return [use for uses in told for use in uses]

    async def _ask(self, gateway: str) -> tuple[InUse, ...]:
        ask = say.encode(say.AskUses(self._agent.config.key))
        try:
            answer = await self._agent.me.call(gateway, ask, timeout_s=USES_TIMEOUT_S)
        except TabaneError as error:
            log.info("%s did not say what it uses here: %s", gateway, error)
            return ()
        uses: tuple[InUse, ...] = say.parse(answer).instances
        return uses

    def measure(self, running: Running) -> MemoryUse:
        return Cgroup(running.instance.cgroup).memory_use()

    def reclaim(self, running: Running) -> None:
        with suppress(OSError):  # it is gone, or not all could be had
            Cgroup(running.instance.cgroup).reclaim()

    def lower(self, asked: LowerAsked) -> None:
        agent = self._agent
        if agent.nodes.is_home(asked.app):
            agent.home.about(asked.app, asked)
        else:
            agent.tell(agent_of(agent.nodes.home_of(asked.app)), say.Lower(asked))


def pressure_of(agent: Agent) -> Pressure:
    around: Around = _Around(agent)
    pressure = Pressure(agent.executor, around, agent.clock, agent.tasks)
    agent.executor.find_room = pressure.find_room
    return pressure
