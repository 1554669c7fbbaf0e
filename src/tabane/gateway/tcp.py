"""The TCP gateway: each connection to an app's public port is a session, in whatever protocol.

A connection is accepted at once and then waits, if need be, until the app has a slot for it; who
speaks first is their affair, as nothing is read from either side to find out. From then on a
`Tunnel` has both connections. A session that gets no instance is reset. As there is nothing to say
it in, the reason is in the log and in the wake records.

Instances of other nodes are reached through their gateways, at a port for that (`forward_port`).
There are no timers of connections: one sweep looks at all of them, as in `tabane.gateway.http`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Protocol

from tabane.clock import SYSTEM, Clock, sleep_until
from tabane.errors import Refused, TabaneError, TimedOut, Unavailable
from tabane.gateway.api import Route, Slot, TcpRoute, TcpRouter
from tabane.gateway.limits import TcpCounters, TcpLimits
from tabane.gateway.tcp_ends import Dialed, HopClient, TcpClient
from tabane.gateway.tcp_wire import OK, Hop, encode_hop, encode_proxy, hop_of
from tabane.gateway.tunnel import Tunnel
from tabane.supervise import Supervisor

log = logging.getLogger(__name__)

SWEEP_S = 0.25
NEW_REVISION_S = 0.1
"""A port that only the next revision has, of which no instance is ready yet, is asked for again."""


class Connection(Protocol):
    """What the sweep looks at: a client that waits, or what its connection became."""

    deadline: float

    def on_deadline(self) -> None: ...

    def abort(self) -> None: ...


class TcpGateway:
    """Takes sessions at any number of ports. Close it before its supervisor."""

    def __init__(
        self,
        router: TcpRouter,
        supervisor: Supervisor,
        limits: TcpLimits | None = None,
        *,
        forward_port: int = 0,
        clock: Clock = SYSTEM,
    ) -> None:
        self.router = router
        self.supervisor = supervisor
        self.limits = limits or TcpLimits()
        self.forward_port = forward_port
        self.clock = clock
        self.now = clock.now()
        self.counters = TcpCounters()
        self.connections: set[Connection] = set()
        self._servers: dict[int, list[asyncio.Server]] = {}
        self._dead: frozenset[str] = frozenset()
        self._sweeper: asyncio.Task[None] | None = None
        self._emptied = asyncio.Event()
        self._emptied.set()

    async def serve(self, sock: socket.socket, port: int) -> None:
        """Accept sessions for the app with that public port; returns at once. `sock` listens, and
        is ours to close."""
        await self._listen(sock, port, lambda: TcpClient(self, port))

    async def serve_hops(self, sock: socket.socket) -> None:
        """Accept what other gateways hand on."""
        await self._listen(sock, 0, lambda: HopClient(self, 0))

    async def _listen(self, sock: socket.socket, port: int, make: Callable[[], TcpClient]) -> None:
        if self._sweeper is None:
            self._sweeper = self.supervisor.keep("tcp sweep", self._sweep_for_ever)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(make, sock=sock, backlog=self.limits.backlog)
        self._servers.setdefault(port, []).append(server)

    def ports(self) -> frozenset[int]:
        """Those at which sessions are accepted."""
        return frozenset(port for port in self._servers if port)

    def leave(self, port: int) -> None:
        """Accept no more sessions there; those that began go on."""
        for server in self._servers.pop(port, ()):
            server.close()

    async def _sweep_for_ever(self) -> None:
        while True:
            await sleep_until(self.clock, self.clock.now() + SWEEP_S)
            self.sweep()

    def sweep(self) -> None:
        """End what is overdue, notice who left unseen."""
        self.now = now = self.clock.now()
        for connection in tuple(self.connections):
            if connection.deadline <= now:
                connection.on_deadline()
            elif isinstance(connection, TcpClient):
                connection.look()

    def break_off(self, dead: frozenset[str], *, complete: bool) -> None:
        """The instances of these pools ended with their network stacks: sessions there are cut off.
        `complete`: those of no other pools have."""
        self._dead = dead if complete else self._dead | dead
        for connection in tuple(self.connections):
            if isinstance(connection, Tunnel) and connection.pool in dead:
                connection.break_off()

    async def drain(self, deadline_s: float) -> None:
        """Accept no more, let sessions end, at most for `deadline_s`, then close."""
        self._stop_accepting()
        try:
            async with asyncio.timeout(deadline_s):
                await self._emptied.wait()
        except TimeoutError:
            log.warning("%d TCP sessions cut at the end of the drain", len(self.connections))
        await self.aclose()

    def abort(self) -> None:
        """Close every connection now. Idempotent."""
        self._stop_accepting()
        for connection in tuple(self.connections):
            connection.abort()

    async def aclose(self) -> None:
        """`abort`, and wait until all is closed and every slot released. Idempotent."""
        self.abort()
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self._emptied.wait()

    def _stop_accepting(self) -> None:
        for port in tuple(self._servers):
            self.leave(port)

    # Sessions

    def admit(self, client: TcpClient) -> None:
        """A new connection."""
        self.connections.add(client)
        self._emptied.clear()
        self.now = self.clock.now()
        if len(self.connections) > self.limits.max_connections:
            self.counters.refused += 1
            client.refuse("this gateway has too many connections")
        elif isinstance(client, HopClient):
            client.deadline = self.now + self.limits.hop_timeout_s
        elif (found := self.router.tcp_route(client.port)) is None:
            client.refuse("no app has this port any more")
        else:
            self.counters.sessions += 1
            client.task = self.supervisor.start("tcp session", self._serve(client, found))

    def forget(self, connection: Connection) -> None:
        """It is closed."""
        self.connections.discard(connection)
        if not self.connections:
            self._emptied.set()

    async def _serve(self, client: TcpClient, found: TcpRoute) -> None:
        route = found.route
        if route.by_caller:
            route = self.router.route_caller(route, client.peer[0], b"")
        try:
            slot, app = await self._reach(route, client.port)
        except TabaneError as error:
            self._refuse(client, error)
            return
        if found.proxy_protocol:
            app.transport.write(encode_proxy(found.proxy_protocol, client.peer, client.here))
        self._join(client, app, slot, found.session_idle_s)

    def _refuse(self, client: TcpClient, error: TabaneError) -> None:
        self.counters.refused += 1
        log.info("a TCP session at port %d gets no instance: %s", client.port, error)
        client.refuse(error.message)

    def begin_hop(self, client: HopClient, hop: Hop) -> None:
        """Another gateway said where its session is to go."""
        client.port = hop.port
        self.counters.sessions += 1
        client.task = self.supervisor.start("tcp hop", self._serve_hop(client, hop))

    async def _serve_hop(self, client: HopClient, hop: Hop) -> None:
        try:
            meant = self.router.accept_forward(hop.fields())
            if isinstance(meant, Route):
                slot, app = await self._reach(meant, hop.port)
            else:
                slot, app = meant, await self._dial_named(meant, hop.port)
        except TabaneError as error:
            self._refuse(client, error)
            return
        client.transport.write(OK)
        self._join(client, app, slot, None)

    async def _dial_named(self, slot: Slot, port: int) -> Dialed:
        """An instance that another gateway has a slot of. Raises `Unavailable`."""
        try:
            return await self._dial(slot, port, 0.0)
        except (OSError, TimeoutError) as error:
            reason = str(error) or "no answer"
            raise Unavailable(f"{slot.host} port {port} could not be reached: {reason}") from error

    async def _reach(self, route: Route, port: int) -> tuple[Slot, Dialed]:
        """A slot, and a connection to what it is of. Raises `TabaneError`: why there is none."""
        give_up, tries = self.clock.now() + route.start_timeout_s, 0
        while True:
            slot = self.router.acquire_nowait(route) or await self.router.acquire(route)
            try:
                if (target := slot.target(port)) is not None:
                    return slot, await self._dial(slot, target, route.start_timeout_s)
            except (OSError, TimeoutError, Refused) as error:
                reason = str(error) or "no answer"
                slot.failed(reason)
                slot.release()
                tries += 1
                if tries >= self.limits.max_tries:
                    problem = f"{route.app} could not be reached, {tries} times: {reason}"
                    raise Unavailable(problem) from error
            except BaseException:
                slot.release()
                raise
            else:
                slot.release()
                if self.clock.now() >= give_up:
                    raise TimedOut(f"no instance of {route.app} has port {port}")
                await sleep_until(self.clock, self.clock.now() + NEW_REVISION_S)

    async def _dial(self, slot: Slot, port: int, hop_s: float) -> Dialed:
        """`hop_s`: what another gateway may take on top. Raises `OSError`, `TimeoutError`,
        `Refused`."""
        if slot.pool in self._dead:
            raise ConnectionResetError("its instance ended")
        hop, to = b"", port
        if slot.headers:
            hop, to = encode_hop(hop_of(slot.headers, port)), self.forward_port
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self.limits.connect_timeout_s) as patience:
            _, app = await loop.create_connection(lambda: Dialed(slot.pool, hop), slot.host, to)
            try:
                if hop:
                    patience.reschedule(loop.time() + self.limits.connect_timeout_s + hop_s)
                await app.wait_taken()
            except BaseException:
                app.transport.abort()
                raise
        return app

    def _join(self, client: TcpClient, app: Dialed, slot: Slot, idle_s: float | None) -> None:
        """From now on a tunnel has both connections."""
        counters = self.counters
        client.task = None
        slot.reached()
        tunnel = Tunnel(client, app, idle_s, lambda: self.now, slot.first_byte)
        self.connections.discard(client)
        self.connections.add(tunnel)
        counters.active += 1

        def on_end() -> None:
            counters.active -= 1
            counters.received_bytes += tunnel.from_client_bytes
            counters.sent_bytes += tunnel.from_app_bytes
            self.forget(tunnel)
            slot.release()

        ended = {"client_ended": client.has_ended, "upstream_ended": app.has_ended}
        tunnel.begin(client.early, app.early, on_end, **ended)
