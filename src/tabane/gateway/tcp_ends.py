"""The two ends of a TCP session until a `Tunnel` has them: who connects, and where it leads."""

from __future__ import annotations

import asyncio
import math
import socket
from typing import TYPE_CHECKING, cast

from tabane.errors import ProtocolError, Refused
from tabane.gateway.flow import Flow
from tabane.gateway.tcp_wire import (
    Address,
    encode_refusal,
    parse_hop,
    parse_reply,
    split_line,
)

if TYPE_CHECKING:
    from tabane.gateway.tcp import TcpGateway

KEEPALIVE = {
    socket.TCP_KEEPIDLE: 60,
    socket.TCP_KEEPINTVL: 10,
    socket.TCP_KEEPCNT: 6,
    socket.TCP_USER_TIMEOUT: 120_000,
}
"""A side that vanished (a power cut, a dropped NAT entry) is noticed within two minutes, whether
something is on its way to it (the last one, in milliseconds) or not."""


def keep_alive(transport: asyncio.BaseTransport) -> None:
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


class TcpClient(Flow):
    """A client that waits for an instance. What it says meanwhile is kept as far as one read goes;
    the rest waits in the kernel, and so at the client.

    One that ends its side has left if it never said anything (a health check, a scan); else it may
    well wait for an answer.
    """

    __slots__ = ("deadline", "early", "gateway", "has_ended", "port", "task")

    def __init__(self, gateway: TcpGateway, port: int) -> None:
        super().__init__()
        self.gateway = gateway
        self.port = port
        self.early = b""
        self.has_ended = False
        self.deadline = math.inf
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        keep_alive(transport)
        self.gateway.admit(self)

    @property
    def peer(self) -> Address:
        return cast(Address, self.transport.get_extra_info("peername")[:2])

    @property
    def here(self) -> Address:
        """Where it connected to."""
        return cast(Address, self.transport.get_extra_info("sockname")[:2])

    def data_received(self, data: bytes) -> None:
        self.early += data
        self.read(False)

    def eof_received(self) -> bool:
        self.has_ended = True
        return bool(self.early)

    def connection_lost(self, error: Exception | None) -> None:
        if self.task is not None:
            self.task.cancel()
        self.gateway.forget(self)

    def look(self) -> None:
        """Nobody reads from it: see whether it has left."""
        if self.reads or self.transport.is_closing():
            return
        silent = self.peer_has_left() and not self.early and not self.count_unread()
        if silent or self.has_broken():
            self.transport.abort()

    def refuse(self, reason: str) -> None:
        """It gets no instance. A reset, since an end in good order would be taken for an answer."""
        self.cut()

    def on_deadline(self) -> None:
        self.cut()

    def leave_if_idle(self) -> None:
        """Who waits is not idle."""

    def abort(self) -> None:
        self.cut()


class HopClient(TcpClient):
    """Another gateway that hands a session on: first a line, see `tcp_wire`."""

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        self.early += data
        if self.task is not None:
            self.read(False)
            return
        try:
            split = split_line(self.early)
            if split is None:
                return
            self.read(False)
            line, self.early = split
            self.deadline = math.inf
            self.gateway.begin_hop(self, parse_hop(line))
        except ProtocolError as error:
            self.refuse(error.message)

    def eof_received(self) -> bool:
        return False

    def refuse(self, reason: str) -> None:
        if not self.transport.is_closing():
            self.transport.write(encode_refusal(reason))
            self.transport.close()


class Dialed(Flow):
    """A new connection to an instance, or (with a `hop`) to another gateway, until the tunnel has
    it a moment later. What it says by then is kept, its end too."""

    __slots__ = ("_answered", "_hop", "early", "has_ended", "pool")

    def __init__(self, pool: str, hop: bytes) -> None:
        super().__init__()
        self.pool = pool
        self.early = b""
        self.has_ended = False
        self._hop = hop
        self._answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        keep_alive(transport)
        if self._hop:
            self.transport.write(self._hop)
        else:
            self._answer("")

    async def wait_taken(self) -> None:
        """Return when the session's bytes may pass. Raises `Refused`, or `ConnectionError`."""
        if reason := await self._answered:
            raise Refused(reason)
        if self.transport.is_closing():
            raise ConnectionResetError("it was closed at once")

    def data_received(self, data: bytes) -> None:
        self.early += data
        if self._answered.done():
            self.read(False)
            return
        try:
            if (split := split_line(self.early)) is not None:
                line, self.early = split
                self._answer(parse_reply(line))
                self.read(False)
        except ProtocolError as error:
            self._answer(error.message)

    def eof_received(self) -> bool:
        self.has_ended = True
        return self._answered.done()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._answered.done():
            self._answered.set_exception(error or ConnectionResetError("it was closed at once"))
            self._answered.exception()

    def _answer(self, reason: str) -> None:
        if not self._answered.done():
            self._answered.set_result(reason)
