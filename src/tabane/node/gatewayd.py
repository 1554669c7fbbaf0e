"""A gateway process of a node: `python -m tabane.node.gatewayd CONFIG.json`.

It takes no connection before it knows the routes: until then they wait in the sockets' backlog,
which the holder keeps open. Once it runs it needs the agent only to wake: sessions of instances it
holds slots of go on while the agent, the hub or the store are away.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable

from tabane.clock import SYSTEM
from tabane.errors import Closed
from tabane.gateway.dns import Resolver, find_upstreams
from tabane.gateway.grants import FEW_APPS, Lease
from tabane.gateway.http import HttpGateway
from tabane.gateway.messages import Demand, ToGateway, ToHome
from tabane.gateway.router import GatewayRouter, Local
from tabane.gateway.tcp import TcpGateway
from tabane.gateway.uses import LOOK_S, Uses
from tabane.middlecon import Change, Client, Message, Room, connect
from tabane.model import AppName, NodeName, WakeRecord
from tabane.node import messages as say
from tabane.node.config import (
    FORWARD_PORT,
    FORWARD_TCP_PORT,
    INSIDE_ADDRESS,
    NodeConfig,
    agent_of,
    node_of,
)
from tabane.node.listeners import take_listeners
from tabane.node.membership import CUT_OFF_S, Membership
from tabane.node.moves import Moves
from tabane.node.part import run_part
from tabane.supervise import Later, Supervisor

DRAIN_S = 10.0
HUB_TIMEOUT_S = 30.0
WAKES_KEPT = 1000
"""Wake records kept while the agent is away."""


class GatewayProcess:
    """The surroundings of a `GatewayRouter`: hub session, homes, other gateways."""

    def __init__(self, config: NodeConfig, name: str, tasks: Supervisor) -> None:
        self.config = config
        self.node: NodeName = config.key
        self.datacenter = config.node.datacenter
        self.name = f"{config.key}/{name}"
        self.token = config.token()
        self.tasks = tasks
        self.router = GatewayRouter(self, SYSTEM)
        self.gateways: list[HttpGateway] = []
        self.tcp = TcpGateway(self.router, tasks, forward_port=FORWARD_TCP_PORT)
        self._ports: frozenset[int] = frozenset()
        self._ports_told = asyncio.Event()
        self._greeting: set[AppName] | None = None
        """Apps told since the last `Hello`, until the answer is complete."""
        self._routed = asyncio.Event()
        self._wakes: deque[WakeRecord] = deque(maxlen=WAKES_KEPT)
        self._homes: dict[AppName, NodeName] = {}
        self._later = Later()
        self._moves = Moves()
        self.router.uses = Uses(self._tell_use, self._look_later)

    async def start(self) -> None:
        """Join the hub and learn the routes."""
        hub = f"unix://{self.config.paths.hub}"
        self.me: Client = await connect(hub, name=self.name, timeout_s=HUB_TIMEOUT_S)
        self.nodes = Membership(self.config, self.me.hubs)
        self.me.on_message(self._on_message)
        self.me.on_hub(self._on_hub)
        self.me.on_connected(self._on_connected)
        self.me.on_disconnected(self._on_disconnected)
        self.room: Room = await self.me.join(say.NODES)
        self.room.on_presence(lambda presence: self._on_presence(presence.member, presence.change))
        self._on_connected()
        await self._routed.wait()

    async def aclose(self) -> None:
        drains = [gateway.drain(DRAIN_S) for gateway in self.gateways]
        await asyncio.gather(*drains, self.tcp.drain(DRAIN_S))
        self._later.close()
        await self.me.aclose()

    def _tell_use(self, lease: Lease, sessions: int) -> None:
        self._tell(agent_of(lease.node), say.Used(lease.instance, sessions))

    def _look_later(self) -> None:
        assert self.router.uses is not None
        self._later.call("uses", LOOK_S, self.router.uses.look)

    # Surroundings

    def tell_home(self, app: AppName, message: ToHome) -> None:
        if isinstance(message, Demand):
            self._moves.foresee()
        self._tell(agent_of(self._home(app)), message)

    def gateway_of(self, node: NodeName) -> tuple[str, int]:
        return self.config.cluster.node(node).address, FORWARD_PORT

    def live_nodes(self) -> list[NodeName]:
        return self.nodes.live_nodes()

    def on_wake(self, record: WakeRecord) -> None:
        self._wakes.append(record)
        self._send_wakes()

    def kick(self) -> None:
        for gateway in self.gateways:
            gateway.kick()

    # Messages

    def _on_message(self, message: Message) -> bytes | None:
        body = say.parse(message.data)
        match body:
            case say.AskCounted():
                return say.encode(self._counted())
            case say.AskUses(node=node):
                return say.encode(say.Uses(self.router.in_use(node)))
            case say.Routes():
                self._on_routes(body)
            case say.LocalInstances():
                here = body.instances
                found = {str(i.generation): Local(i.app, i.address, i.trust) for i in here}
                self.router.set_locals(found, complete=body.complete)
                dead = frozenset(str(generation) for generation in body.dead)
                for gateway in self.gateways:
                    gateway.break_off(dead, complete=body.complete)
                self.tcp.break_off(dead, complete=body.complete)
            case say.TcpPorts(ports=ports):
                self._on_ports(frozenset(ports))
            case _:
                from_home: ToGateway = body
                self.router.hear(from_home, message.sender)
        return None

    def _counted(self) -> say.Counted:
        sides = zip(("clients", "gateways"), self.gateways, strict=False)  # none before `serve`
        return say.Counted({side: one.counters for side, one in sides}, self.tcp.counters)

    def _on_routes(self, routes: say.Routes) -> None:
        self.router.set_routes(routes.apps, routes.gone, routes.revision)
        if self._greeting is None:
            return
        self._greeting |= {app.key for app in routes.apps}
        if routes.complete:
            self.router.set_routes((), self.router.known_apps() - self._greeting)
            self._greeting = None
            self._routed.set()

    def _on_ports(self, ports: frozenset[int]) -> None:
        """Those that are gone are left now: they may be listened on anew."""
        for port in self.tcp.ports() - ports:
            self.tcp.leave(port)
        self._ports = ports
        self._ports_told.set()

    async def follow_ports(self) -> None:
        """Accept at all ports that the agent told of."""
        while True:
            await self._ports_told.wait()
            self._ports_told.clear()
            try:
                await self._take_ports(self._ports - self.tcp.ports())
            except BaseException:
                self._ports_told.set()
                raise

    async def _take_ports(self, missing: frozenset[int]) -> None:
        hosts = self.config.node.address, INSIDE_ADDRESS
        addresses = {f"{host}:{port}": port for port in sorted(missing) for host in hosts}
        path = self.config.paths.listeners
        taken = await asyncio.to_thread(take_listeners, path, addresses)
        for address, sock in taken.items():
            if addresses[address] in self._ports:
                await self.tcp.serve(sock, addresses[address])
            else:
                sock.close()

    def _on_connected(self) -> None:
        """A new hub session: greet the agent if it is there, and report to the homes."""
        for member in tuple(self.room.members):
            self._on_presence(member, Change.JOINED)

    def _on_presence(self, member: str, change: Change) -> None:
        """An agent that is new knows nothing of this gateway."""
        node, _, part = member.rpartition("/")
        if part != "agent" or change not in (Change.JOINED, Change.BACK):
            return
        assert self.router.uses is not None
        self.router.uses.tell_all()
        if node == self.node:
            self._greeting = set()
            self._tell(member, say.Hello())
            self._send_wakes()
        if self.nodes.is_near(node):
            self._report(NodeName(node))

    def _on_hub(self, hub: str, is_open: bool) -> None:
        self._on_nodes()
        if not is_open:
            self._later.call("cut off", CUT_OFF_S, self._give_up)

    def _on_disconnected(self) -> None:
        self._later.call("cut off", CUT_OFF_S, self._give_up)

    def _give_up(self) -> None:
        """Use no more what agents granted that cannot be reached now. This node's own cannot be
        cut off from us without being cut off from all."""
        for home in self.router.homes():
            node = node_of(home)
            if node != self.node and not (self.me.connected and self.me.hubs.get(node)):
                self.router.cut_off(home)

    def _on_nodes(self) -> None:
        """Nodes came or went: apps whose home moved are reported to the new one."""
        before, self._homes = self._homes, {}
        moved = {self._home(app) for app, home in before.items() if self._home(app) != home}
        for node in moved:
            self._report(node)

    def _report(self, node: NodeName) -> None:
        mine = frozenset(app for app in self.router.apps_in_use() if self._home(app) == node)
        self._tell(agent_of(node), self.router.report(mine))

    def _home(self, app: AppName) -> NodeName:
        if app not in self._homes:
            self._forget_homes()
            self._homes[app] = self.nodes.home_of(app)
        return self._homes[app]

    def _forget_homes(self) -> None:
        """Of apps that are not in use any more, when they are many."""
        if len(self._homes) >= 2 * FEW_APPS:
            in_use = self.router.apps_in_use()
            if len(self._homes) >= 2 * len(in_use):
                self._homes = {app: self._homes[app] for app in in_use if app in self._homes}

    def _tell(self, member: str, message: say.Message) -> None:
        """In order; what is lost with a hub session is made good by the next report."""
        try:
            self.me.send_nowait(member, say.encode(message), urgent=True)
        except Closed:
            return

    def _send_wakes(self) -> None:
        if agent_of(self.node) in self.room.members:
            while self._wakes:
                self._tell(agent_of(self.node), say.Woke(self._wakes.popleft()))


async def serve(
    config: NodeConfig, sockets: dict[str, socket.socket], tasks: Supervisor
) -> Callable[[], Awaitable[None]]:
    """Take sessions from outside (`http`), from instances (`inside`), from gateways (`forward`),
    and at the TCP ports of apps."""
    process = GatewayProcess(config, os.environ.get("TABANE_PART", "gateway-0"), tasks)
    await process.start()
    outside = HttpGateway(process.router, tasks)
    between = HttpGateway(process.router, tasks, forward=True)
    process.gateways = [outside, between]
    await outside.serve(sockets["http"])
    await outside.serve(sockets["inside"])
    await between.serve(sockets["forward"])
    await process.tcp.serve_hops(sockets["forward-tcp"])
    tasks.keep("tcp ports", process.follow_ports)
    resolver = Resolver(process.router.is_app, tasks, upstreams=find_upstreams())
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(lambda: resolver, sock=sockets["dns"])
    await asyncio.start_server(resolver.serve_stream, sock=sockets["dns-tcp"])
    return process.aclose


if __name__ == "__main__":
    run_part(serve)
