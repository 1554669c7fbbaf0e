"""The HTTP gateway: a reverse proxy that asks a `Router` where each request belongs.

It runs on asyncio protocols (uvloop makes it fast). A request whose slot is free and whose
connection is kept goes through without a task, a timer or an await. There are no timers of
connections at all: each carries the moment it is due, and one sweep a quarter second looks at all
of them; `now` is the moment of the last sweep.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Protocol

from tabane.clock import SYSTEM, Clock, sleep_until
from tabane.gateway.api import Router
from tabane.gateway.client import Client
from tabane.gateway.exchange import Exchange
from tabane.gateway.limits import AccessRecord, HttpCounters, HttpLimits
from tabane.gateway.pools import Pools
from tabane.gateway.sides import ClientSide
from tabane.gateway.tunnel import Tunnel
from tabane.model import app_of_cohort
from tabane.supervise import Supervisor

SWEEP_S = 0.25
KICK_S = 1.0


class Connection(Protocol):
    """What the sweep looks at: a client, or what its connection became."""

    deadline: float

    def on_deadline(self) -> None: ...

    def leave_if_idle(self) -> None: ...

    def abort(self) -> None: ...


class HttpGateway:
    """Serves HTTP/1.1, and HTTP/2 to those who begin with it, on any number of listening sockets.

    `forward` is for the port between gateways: there the router's `accept_forward` chooses, and
    what the other gateway says about the client is believed. Close it before its supervisor.
    """

    def __init__(
        self,
        router: Router,
        supervisor: Supervisor,
        limits: HttpLimits | None = None,
        *,
        forward: bool = False,
        scheme: str = "http",
        clock: Clock = SYSTEM,
        on_access: Callable[[AccessRecord], None] | None = None,
    ) -> None:
        self.router = router
        self.supervisor = supervisor
        self.limits = limits or HttpLimits()
        self.forward = forward
        self.scheme = scheme
        self.clock = clock
        self.now = clock.now()
        self.counters = HttpCounters()
        self.pools = Pools(self.limits, self.now)
        self.connections: set[Connection] = set()
        self.draining = False
        self.on_access = on_access
        self._servers: list[asyncio.Server] = []
        self._sweeper: asyncio.Task[None] | None = None
        self._kicked_at = self.now
        self._emptied = asyncio.Event()
        self._emptied.set()

    async def serve(self, sock: socket.socket) -> None:
        """Accept connections on a socket that listens; returns at once. It is ours to close."""
        loop = asyncio.get_running_loop()
        if self._sweeper is None:
            self._sweeper = self.supervisor.keep("http sweep", self._sweep_for_ever)
        server = await loop.create_server(
            lambda: Client(self), sock=sock, backlog=self.limits.backlog
        )
        self._servers.append(server)

    async def _sweep_for_ever(self) -> None:
        while True:
            await sleep_until(self.clock, self.clock.now() + SWEEP_S)
            self.sweep()

    def sweep(self) -> None:
        """Look at every connection: end what is overdue, notice who left unseen."""
        self.now = self.pools.now = now = self.clock.now()
        for connection in tuple(self.connections):
            if connection.deadline <= now:
                connection.on_deadline()
            elif (
                isinstance(connection, Client) and connection.is_deaf and connection.peer_has_left()
            ):
                connection.on_left()
        self.pools.close_unused_since(now - self.limits.upstream_idle_s)
        if now - self._kicked_at >= KICK_S:
            self.kick()

    def kick(self) -> None:
        """Close now the kept connections that the router wants closed, as each second anyway."""
        self._kicked_at = self.now
        self.pools.close_gone(self.router.pools_gone())

    def break_off(self, dead: frozenset[str], *, complete: bool) -> None:
        """The instances of these pools ended with their network stacks: requests in flight there
        go on as if their connections were reset. `complete`: those of no other pools have."""
        self.pools.break_off(dead, complete=complete)
        for connection in tuple(self.connections):
            if isinstance(connection, Tunnel) and connection.pool in dead:
                connection.break_off()

    async def drain(self, deadline_s: float) -> None:
        """Accept no more, let requests in flight end, at most for `deadline_s`, then close."""
        self.draining = True
        self._stop_accepting()
        for connection in tuple(self.connections):
            connection.leave_if_idle()
        try:
            async with asyncio.timeout(deadline_s):
                await self._emptied.wait()
        except TimeoutError:
            logging.getLogger(__name__).warning(
                "%d connections cut at the end of the drain", len(self.connections)
            )
        await self.aclose()

    def abort(self) -> None:
        """Close every connection now. Idempotent."""
        self.draining = True
        self._stop_accepting()
        for connection in tuple(self.connections):
            connection.abort()
        self.pools.abort()

    async def aclose(self) -> None:
        """`abort`, and wait until all is closed and every slot released. Idempotent."""
        self.abort()
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self._emptied.wait()
        await self.pools.wait_closed()

    def _stop_accepting(self) -> None:
        for server in self._servers:
            server.close()
        self._servers.clear()

    # For clients and exchanges.

    def admit(self, client: Client) -> bool:
        """Take a new connection in; False when there are too many (it is to be told and closed)."""
        self.connections.add(client)
        self._emptied.clear()
        if len(self.connections) <= self.limits.max_connections:
            return True
        self.counters.refused_connections += 1
        return False

    def replace(self, client: Client, successor: Connection) -> None:
        self.connections.discard(client)
        self.connections.add(successor)

    def forget(self, connection: Connection) -> None:
        """It is closed."""
        self.connections.discard(connection)
        if not self.connections:
            self._emptied.set()

    def tell_access(self, exchange: Exchange, client: ClientSide) -> None:
        """An exchange has ended."""
        assert self.on_access is not None
        request = exchange.request.head
        record = AccessRecord(
            app=app_of_cohort(exchange.route.app)[0] if exchange.route is not None else None,
            method=request.method.decode("latin-1"),
            host=request.host,
            path=request.path,
            status=exchange.status,
            duration_s=self.clock.now() - exchange.begun,
            peer=client.provenance.peer,
        )
        self.on_access(record)
