"""The apps' TCP ports on this node: the holder listens, the gateways accept, instances get there.

Which there are is in the store. After each change, and now and then as long as one of them cannot
be listened on (another program may have it), the holder is told all of them; then the packet filter
lets instances through to them, and the gateways are told of those that are there. What is in the
way of one is an event, and is published, so that every node can show it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import msgspec

from tabane.errors import TabaneError
from tabane.model import InstanceId, NodeName, State
from tabane.network.rules import apply_rules, tcp_ports
from tabane.node.config import INSIDE_ADDRESS, agent_of
from tabane.node.control import TCP
from tabane.node.running import Transition
from tabane.store.api import Change

if TYPE_CHECKING:
    from tabane.node.agent import Agent

log = logging.getLogger(__name__)

KEY = "tcp"
"""Of what an agent publishes: `{PORT: PROBLEM}`, if there are any."""
RETRY_S = 5.0


class TcpPorts:
    """See the module's text."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        self._problems: dict[int, str] = {}
        self.open: tuple[int, ...] = ()
        """The ports at which gateways are to accept."""

    def on_changes(self, changes: tuple[Change, ...]) -> None:
        """The store changed."""
        if any(change.key.startswith(TCP) for change in changes):
            self._settled.clear()
            self._changed.set()

    async def wait_settled(self) -> None:
        """Return once who connects to any of the ports is not refused, or cannot but be."""
        await self._settled.wait()

    def wanted(self) -> dict[int, str]:
        """All ports that apps have, and whose they are."""
        entries = self._agent.replica.range(TCP)
        return {int(entry.key.removeprefix(TCP)): entry.value.decode() for entry in entries}

    async def follow(self) -> None:
        """Bring the node to what the store says, again and again."""
        while True:
            self._changed.clear()
            try:
                await self._settle()
            finally:
                if not self._changed.is_set():
                    self._settled.set()
            try:
                async with asyncio.timeout(RETRY_S if self._problems else None):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _settle(self) -> None:
        wanted = self.wanted()
        gone = [port for port in self.open if port not in wanted]
        if gone:
            self._tell(tuple(port for port in self.open if port in wanted))
            await self._agent.gateways.wait_told()  # else a port could not be listened on anew
        problems = await self._listen(sorted(wanted))
        there = tuple(port for port in sorted(wanted) if port not in problems)
        if there != self.open:
            await asyncio.to_thread(apply_rules, tcp_ports(there))
            self._tell(there)
        await self._report(problems, wanted)

    def _tell(self, ports: tuple[int, ...]) -> None:
        self.open = ports
        self._agent.gateways.tell_ports(ports)

    async def _listen(self, ports: list[int]) -> dict[int, str]:
        """What is in the way, by port."""
        here = self._agent.config.node.address
        addresses = {f"{host}:{port}": port for port in ports for host in (here, INSIDE_ADDRESS)}
        try:
            found = await self._agent.spawner.listen(tuple(addresses))
        except TabaneError as error:
            return dict.fromkeys(ports, error.message)
        return {addresses[address]: f"{address}: {why}" for address, why in found.items()}

    async def _report(self, problems: dict[int, str], wanted: dict[int, str]) -> None:
        """Tell what is new about what is in the way."""
        before, self._problems = self._problems, problems
        if before == problems:
            return
        for port, why in problems.items():
            if before.get(port) != why:
                self._say(f"TCP port {port} of {wanted[port]} cannot be listened on: {why}")
        await self._agent.me.state.put(KEY, msgspec.msgpack.encode(problems))

    def _say(self, reason: str) -> None:
        log.warning("%s", reason)
        now, node = self._agent.clock.wall(), self._agent.config.key
        event = Transition(now, InstanceId(""), "", node, State.FAILED, reason, "gateway")
        self._agent.happenings.record(event)

    def problems(self, port: int) -> dict[NodeName, str]:
        """Why nodes do not take sessions at an app's port, as far as this one has heard."""
        found: dict[NodeName, str] = {}
        for node in self._agent.config.cluster.keys:
            told = self._agent.room.state.get(agent_of(node), {}).get(KEY)
            if told is not None and (why := msgspec.msgpack.decode(told, type=dict[int, str])):
                found |= {node: why[port]} if port in why else {}
        return found
