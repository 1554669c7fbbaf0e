"""HTTP by hand: a client and a server that send and see every byte, and a gateway between them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tabane.gateway.http import HttpGateway
from tabane.gateway.limits import AccessRecord, HttpLimits
from tabane.supervise import Supervisor
from tabane.testing.clock import VirtualClock
from tabane.testing.gateway import FakeApp, FakeRouter

PATIENCE_S = 60.0
"""A test that waits longer for one thing has failed."""


@dataclass(frozen=True)
class Message:
    """A request or response as it was on the wire; `headers` have lower-case names."""

    line: str
    headers: dict[str, str]
    body: bytes
    raw_head: bytes

    @property
    def status(self) -> int:
        return int(self.line.split()[1])


class Wire:
    """One end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            async with asyncio.timeout(PATIENCE_S):
                await self.writer.drain()

    async def head(self) -> tuple[str, dict[str, str], bytes]:
        async with asyncio.timeout(PATIENCE_S):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        line, *fields = raw.decode("latin-1").split("\r\n")[:-2]
        pairs = [field.split(": ", 1) for field in fields]
        return line, {name.lower(): value for name, value in pairs}, raw

    async def receive(self, *, no_body: bool = False) -> Message:
        """The next message, whole. Raises `IncompleteReadError` when it is cut off."""
        line, headers, raw = await self.head()
        is_request = not line.startswith("HTTP/")
        if no_body or (not is_request and line.split()[1] in ("100", "103", "101", "204", "304")):
            return Message(line, headers, b"", raw)
        async with asyncio.timeout(PATIENCE_S):
            if headers.get("transfer-encoding") == "chunked":
                body = await self._chunks()
            elif "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            else:
                body = b"" if is_request else await self.reader.read()
        return Message(line, headers, body, raw)

    async def _chunks(self) -> bytes:
        body = b""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            body += await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"
        assert await self.reader.readexactly(2) == b"\r\n"
        return body

    async def ask(self, request: bytes, *, no_body: bool = False) -> Message:
        await self.send(request)
        return await self.receive(no_body=no_body)

    async def at_end(self) -> bool:
        """The other side closed, in good order, without a further byte."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read(1) == b""

    async def wait_reset(self) -> None:
        """Wait until the connection is broken off: reset, or cut short."""
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                await self.reader.read()

    def half_close(self) -> None:
        self.writer.write_eof()

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        """Close with an RST."""
        if self.writer.transport.is_closing():
            return
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Wire], Awaitable[None]]


class ScriptedServer:
    """Runs a script for each connection it accepts; the connection is closed when that ends."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.accepted = 0
        self.ended = asyncio.Event()
        """A script has ended, or failed."""
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.accepted += 1
        try:
            await self.script(Wire(reader, writer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the other side left, as the test made it
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            self.ended.set()
            writer.close()


async def echo(wire: Wire) -> None:
    """Answer each request with its own head and body, in a body of known length."""
    while True:
        message = await wire.receive()
        body = message.raw_head + message.body
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


def answer(*pieces: bytes) -> Script:
    """Read one request's head, send these bytes, close."""

    async def script(wire: Wire) -> None:
        await wire.head()
        await wire.send(*pieces)

    return script


class Rig:
    """A gateway on loopback with a fake router. `host` of the only app is `a.test`."""

    def __init__(self, gateway: HttpGateway, router: FakeRouter, clock: VirtualClock) -> None:
        self.gateway = gateway
        self.router = router
        self.clock = clock
        self.port = 0
        self.servers: list[ScriptedServer] = []
        self.records: list[AccessRecord] = []
        self.wires: list[Wire] = []

    @property
    def app(self) -> FakeApp:
        return self.router.apps["a.test"]

    async def connect(self, *, receive_buffer: int = 0) -> Wire:
        """A client; `receive_buffer` bytes are what its kernel takes while it does not read."""
        sock = socket.socket(proto=socket.IPPROTO_TCP)  # asyncio sends such without delay
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
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

    async def settle(self) -> None:
        """Wait until no exchange is in flight; then every slot must be back."""
        await self.until(lambda: self.gateway.counters.active == 0)
        assert [slot.releases for slot in self.router.slots] == [1] * len(self.router.slots)


@contextlib.asynccontextmanager
async def http_rig(
    *scripts: Script,
    limits: HttpLimits | None = None,
    forward: bool = False,
    **app: Any,
) -> AsyncIterator[Rig]:
    """A gateway before one app with an instance for each script (see `FakeApp` for `app`).

    At the end all is closed, and every slot must have been released exactly once.
    """
    router, clock = FakeRouter(), VirtualClock()
    listener = socket.create_server(("127.0.0.1", 0))
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(ScriptedServer(script)) for script in scripts]
        tasks = await stack.enter_async_context(Supervisor("test"))
        gateway = HttpGateway(router, tasks, limits, forward=forward, clock=clock)
        rig = Rig(gateway, router, clock)
        gateway.on_access = rig.records.append
        rig.servers = servers
        rig.port = listener.getsockname()[1]
        router.add("a.test", FakeApp("default/a", [("127.0.0.1", s.port) for s in servers], **app))
        await gateway.serve(listener)
        try:
            yield rig
        finally:
            await gateway.aclose()
            await close_all(rig.wires)
        await rig.settle()


async def close_all(wires: Iterable[Wire]) -> None:
    for wire in wires:
        wire.writer.close()
    for wire in wires:
        with contextlib.suppress(ConnectionError):
            await wire.writer.wait_closed()
