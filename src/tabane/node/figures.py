"""What a node tells of itself for placement: its drivers, its instances, and what memory there is
for more. Each node tells it when it changes, all read what was told; nobody asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from tabane.clock import sleep_until
from tabane.scheduler.placement import NodeView

if TYPE_CHECKING:
    from tabane.node.agent import Agent

LOOK_S = 2.0
WORTH_BYTES = 64 << 20
"""A change of less is told with the next that is more: every node hears of each."""


class Figures:
    """See the module's text."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._told_bytes = 0

    def view(self) -> NodeView:
        """This node, as it is now."""
        agent, pressure = self._agent, self._agent.pressure
        view = agent.engines.view(len(agent.executor), pressure.free_bytes())
        accounts = agent.executor.admission.accounts()
        return replace(view, memory_idle_bytes=pressure.idle_bytes(), accounts=accounts)

    async def tell(self) -> None:
        """Tell all. Raises as a session to the hub does."""
        view = self.view()
        self._told_bytes = _room_bytes(view)
        await self._agent.me.state.put("node", msgspec.msgpack.encode(view))

    async def try_machines(self) -> None:
        """Try the drivers that start machines, which takes seconds, and tell what became of it."""
        await self._agent.engines.probe(machines=True)
        if self._agent.me.connected:
            await self.tell()

    async def watch(self) -> None:
        """Tell when memory has become more or less by what is worth it; for ever."""
        clock = self._agent.clock
        while True:
            await sleep_until(clock, clock.now() + LOOK_S)
            now_bytes = _room_bytes(self.view())
            if abs(now_bytes - self._told_bytes) >= WORTH_BYTES and self._agent.me.connected:
                await self.tell()


def _room_bytes(view: NodeView) -> int:
    return (view.memory_available_bytes or 0) + view.memory_idle_bytes
