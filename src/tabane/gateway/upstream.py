"""Connections to apps (or to other gateways), and the pools that keep them for reuse.

The invariant that no response reaches a wrong request: a connection serves at most one exchange at
a time, from `begin` to `end`, and what it reads goes to that exchange or nowhere. It is kept after
`end` only when the request was sent whole, the response was read whole with nothing behind it, and
the app means to keep it; a byte that comes while it serves nobody closes it. Only slots of the pool
it was made for get it.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from tabane.gateway.api import Slot
from tabane.gateway.flow import Flow
from tabane.gateway.forwarding import LAST_CHUNK, Extra, Provenance, encode_chunk, encode_request
from tabane.gateway.headers import BadMessage
from tabane.gateway.heads import RequestHead
from tabane.gateway.http1 import ResponseReader
from tabane.gateway.limits import HttpLimits

INSTANCE_ENDED = "its instance ended"


class Peer(Protocol):
    """What a connection serves: an exchange."""

    def on_response(self, reader: ResponseReader) -> None:
        """More of the response came."""

    def on_upstream_end(self, reader: ResponseReader, reason: str) -> None:
        """The connection ended before the exchange did, and serves it no more."""

    def on_upstream_flow(self) -> None:
        """The connection takes bytes again, or (`is_full`) takes no more for now."""


class Upstream(Flow):
    """One connection to an app."""

    __slots__ = (
        *("_chunked", "_head", "_pools"),
        *("is_used", "peer", "pool", "reader", "spoke_first", "unused_at"),
    )

    def __init__(self, pool: str, pools: Pools) -> None:
        super().__init__()
        self.pool = pool
        self._pools = pools
        self.peer: Peer | None = None
        self.reader = ResponseReader(b"")
        self.is_used = False
        """It has served an exchange before."""
        self.spoke_first = False
        """The app sent something before it was asked anything."""
        self.unused_at = 0.0
        self._head = b""
        """Of the request, while it was not sent."""
        self._chunked = False

    def begin(
        self,
        peer: Peer,
        head: RequestHead,
        provenance: Provenance,
        extra: Extra,
        expects_continue: bool,
    ) -> None:
        """Serve `peer`, whose request has this head. That goes out with the first of its body."""
        assert self.peer is None
        self.peer = peer
        self.reader = ResponseReader(head.method)
        out = encode_request(head, provenance, extra, expects_continue)
        if head.has_body:
            self._chunked = head.chunked
            self._head = out
        else:
            self.transport.write(out)

    def send(self, pieces: list[bytes], is_end: bool) -> None:
        """More of the request's body (perhaps none yet), or the last of it."""
        out, self._head = self._head, b""
        if pieces:
            out += encode_chunk(pieces) if self._chunked else b"".join(pieces)
        if is_end and self._chunked:
            out += LAST_CHUNK
        if out:
            self.transport.write(out)

    def end(self, now: float | None) -> None:
        """The response is whole: serve nobody, whatever still comes is not for the last peer. With
        `now`, the request was sent whole, too: it can be kept for others."""
        self.peer = None
        self.is_used = True
        if now is None or not self.reader.is_reusable or self.transport.is_closing():
            self.transport.abort()
            return
        if not self.reads:
            self.read(True)
        self._pools.put(self, now)

    def abort(self) -> None:
        """Close it at once. Idempotent."""
        self.peer = None
        self.transport.abort()

    def hand_over(self) -> None:
        """Something else has the transport from now on."""
        self.peer = None
        self._pools.on_lost(self)

    def data_received(self, data: bytes) -> None:
        peer = self.peer
        if peer is None:
            self.spoke_first = not self.is_used
            self.transport.abort()
            return
        self.reader.feed(data)
        peer.on_response(self.reader)

    def eof_received(self) -> bool:
        if self.is_dead:
            self.transport.abort()
            self._lose(INSTANCE_ENDED)
            return False
        self.reader.end()
        self._lose("the app closed the connection")
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._pools.on_lost(self)
        self._lose(f"the connection to the app broke off ({error or 'closed'})")

    def _lose(self, reason: str) -> None:
        peer, self.peer = self.peer, None
        if peer is not None:
            peer.on_upstream_end(self.reader, reason)

    def on_flow(self) -> None:
        if self.peer is not None:
            self.peer.on_upstream_flow()


class Pools:
    """The connections that serve nobody now, by pool, and the way to get new ones."""

    def __init__(self, limits: HttpLimits) -> None:
        self._limits = limits
        self._idle: dict[str, list[Upstream]] = {}
        self._all: set[Upstream] = set()
        self._gone: frozenset[str] = frozenset()
        self._dead: frozenset[str] = frozenset()
        self._connecting: dict[asyncio.Timeout, str] = {}
        self.idle = 0
        self._emptied = asyncio.Event()
        self._emptied.set()

    def __len__(self) -> int:
        return len(self._all)

    def take(self, pool: str, replayable: bool) -> Upstream | None:
        """The kept connection of `pool` used last, if any.

        For a request that cannot be sent twice it is made sure, as far as the kernel knows now,
        that the app has not closed it.
        """
        idle = self._idle.get(pool)
        while idle:
            connection = idle.pop()
            self.idle -= 1
            if connection.transport.is_closing():
                continue
            if replayable or not connection.has_news():
                return connection
            connection.abort()
        return None

    def put(self, connection: Upstream, now: float) -> None:
        """Keep a connection that served its exchange to the end."""
        pool, is_full = connection.pool, self.idle >= self._limits.max_idle_upstreams
        if is_full or pool in self._gone or pool in self._dead:
            connection.abort()
            return
        connection.unused_at = now
        idle = self._idle.get(connection.pool)
        if idle is None:
            self._idle[connection.pool] = [connection]
        else:
            idle.append(connection)
        self.idle += 1

    async def connect(self, slot: Slot) -> Upstream:
        """A new connection. Raises `OSError`, `TimeoutError` or `BadMessage`; no byte was sent."""
        if slot.pool in self._dead:
            raise ConnectionResetError(INSTANCE_ENDED)
        connection = await self._open(slot)
        if connection.spoke_first:
            raise BadMessage(502, "the app's answer is not HTTP/1.1: it came before the request")
        if connection.transport.is_closing():
            raise ConnectionResetError("it was closed at once")
        self._all.add(connection)
        self._emptied.clear()
        if slot.pool in self._dead:
            connection.break_off()
        return connection

    async def _open(self, slot: Slot) -> Upstream:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._limits.connect_timeout_s) as patience:
            self._connecting[patience] = slot.pool
            try:
                _, connection = await loop.create_connection(
                    lambda: Upstream(slot.pool, self), slot.host, slot.port
                )
            finally:
                del self._connecting[patience]
        return connection

    def on_lost(self, connection: Upstream) -> None:
        self._all.discard(connection)
        if not self._all:
            self._emptied.set()
        idle = self._idle.get(connection.pool)
        if idle is not None and connection in idle:
            idle.remove(connection)
            self.idle -= 1

    def close_gone(self, gone: frozenset[str]) -> None:
        """Close what is kept of these pools, and keep nothing of them until the next call."""
        self._gone = gone
        for pool in gone & self._idle.keys():
            self._close(self._idle.pop(pool))

    def break_off(self, dead: frozenset[str], *, complete: bool) -> None:
        """The instances of these pools ended: whatever waits for them waits no longer, and nothing
        connects to them. `complete`: those of no other pools have."""
        self._dead = dead if complete else self._dead | dead
        for pool in dead & self._idle.keys():
            self._close(self._idle.pop(pool))
        for connection in [one for one in self._all if one.pool in dead]:
            connection.break_off()
        for patience, pool in self._connecting.items():
            if pool in dead:
                patience.reschedule(asyncio.get_running_loop().time())

    def close_unused_since(self, moment: float) -> None:
        for pool, idle in list(self._idle.items()):
            stale = [connection for connection in idle if connection.unused_at < moment]
            if len(stale) == len(idle):
                del self._idle[pool]
            else:
                self._idle[pool] = [one for one in idle if one.unused_at >= moment]
            self._close(stale)

    def abort(self) -> None:
        """Close every connection at once."""
        for connection in list(self._all):
            connection.abort()

    async def wait_closed(self) -> None:
        """Wait until the last connection is gone."""
        await self._emptied.wait()

    def _close(self, idle: list[Upstream]) -> None:
        self.idle -= len(idle)
        for connection in idle:
            connection.abort()
