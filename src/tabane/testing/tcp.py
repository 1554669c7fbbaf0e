"""A TCP gateway on loopback, before servers that do what a test says."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

from tabane.gateway.api import TcpRoute
from tabane.gateway.limits import TcpLimits
from tabane.gateway.tcp import TcpGateway
from tabane.supervise import Supervisor
from tabane.testing.clock import VirtualClock
from tabane.testing.gateway import FakeApp, FakeRouter
from tabane.testing.http import PATIENCE_S, Script, ScriptedServer, Wire, close_all

PUBLIC = 2525


class TcpRig:
    """The gateway's only app has the public port `PUBLIC`; `hops` is where gateways hand on."""

    def __init__(self, gateway: TcpGateway, router: FakeRouter, clock: VirtualClock) -> None:
        self.gateway = gateway
        self.router = router
        self.clock = clock
        self.servers: list[ScriptedServer] = []
        self.port = self.hops = 0
        self.wires: list[Wire] = []

    @property
    def app(self) -> FakeApp:
        return self.router.apps["a"]

    async def connect(self, port: int = 0, *, receive_buffer: int = 0) -> Wire:
        """A client; `receive_buffer` bytes are what its kernel takes while it does not read."""
        sock = socket.socket(proto=socket.IPPROTO_TCP)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port or self.port))
        except OSError:
            sock.close()
            raise
        wire = Wire(*await asyncio.open_connection(sock=sock, limit=1 << 16))
        self.wires.append(wire)
        return wire

    def pass_time(self, seconds: float) -> None:
        """Let the gateway believe that so much time went by."""
        self.clock.advance(seconds)
        self.gateway.sweep()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the loop will bring about."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - it has no event, and no hook of its own
                await asyncio.sleep(0.001)

    async def wait_gone(self) -> None:
        """Until no connection is left; then every slot must be back."""
        await self.until(lambda: not self.gateway.connections and not self.router.held)
        assert [slot.releases for slot in self.router.slots] == [1] * len(self.router.slots)
        assert self.gateway.counters.active == 0


@contextlib.asynccontextmanager
async def tcp_rig(
    *scripts: Script,
    limits: TcpLimits | None = None,
    session_idle_s: float | None = None,
    proxy_protocol: str = "",
    **app: Any,
) -> AsyncIterator[TcpRig]:
    """A gateway before one app with an instance for each script (see `FakeApp` for `app`). At the
    end all is closed, and every slot must have been released exactly once."""
    router, clock = FakeRouter(), VirtualClock()
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    port, hops = (listener.getsockname()[1] for listener in listeners)
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(ScriptedServer(script)) for script in scripts]
        tasks = await stack.enter_async_context(Supervisor("test"))
        gateway = TcpGateway(router, tasks, limits, forward_port=hops, clock=clock)
        rig = TcpRig(gateway, router, clock)
        rig.servers, rig.port, rig.hops = servers, port, hops
        places = [("127.0.0.1", server.port) for server in servers]
        fake = router.add("a", FakeApp("default/a", places, **app))
        router.ports[PUBLIC] = TcpRoute(fake.route, session_idle_s, proxy_protocol)
        await gateway.serve(listeners[0], PUBLIC)
        await gateway.serve_hops(listeners[1])
        try:
            yield rig
        finally:
            await gateway.aclose()
            await close_all(rig.wires)
        await rig.wait_gone()
