"""The connections to apps (or to other gateways) that are kept for reuse, and the way to new ones.

One of HTTP/1.1 serves one exchange at a time, so those that are kept are idle ones. One of HTTP/2
serves many, and a pool has another only when all of its connections have as many streams as
the app takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from tabane.gateway.api import H2C, Slot
from tabane.gateway.headers import BadMessage
from tabane.gateway.http2_app import AppStream, Http2App
from tabane.gateway.limits import HttpLimits
from tabane.gateway.sides import AppSide
from tabane.gateway.upstream import INSTANCE_ENDED, Upstream

Opened = TypeVar("Opened", bound=asyncio.BaseProtocol)


class Pools:
    """See the module's text. `now` is the moment of the gateway's last sweep."""

    def __init__(self, limits: HttpLimits, now: float) -> None:
        self._limits = limits
        self.now = now
        self._idle: dict[str, list[Upstream]] = {}
        self._shared: dict[str, list[Http2App]] = {}
        self._opening: dict[str, asyncio.Lock] = {}
        self._all: set[Upstream | Http2App] = set()
        self._gone: frozenset[str] = frozenset()
        self._dead: frozenset[str] = frozenset()
        self._connecting: dict[asyncio.Timeout, str] = {}
        self.idle = 0
        """Connections of HTTP/1.1 that are kept."""
        self._emptied = asyncio.Event()
        self._emptied.set()

    def __len__(self) -> int:
        return len(self._all)

    def take(self, slot: Slot, replayable: bool) -> AppSide | None:
        """The kept connection of the slot's pool used last, if any, or a stream of a shared one.

        For a request that cannot be sent twice it is made sure, as far as the kernel knows now,
        that the app has not closed it.
        """
        idle = self._idle.get(slot.pool)
        while idle:
            connection = idle.pop()
            self.idle -= 1
            if connection.transport.is_closing():
                continue
            if replayable or not connection.has_news():
                return connection
            connection.abort()
        return self._open_stream(slot.pool) if slot.protocol == H2C else None

    def put(self, connection: Upstream, now: float) -> None:
        """Keep a connection that served its exchange to the end."""
        pool, is_full = connection.pool, self.idle >= self._limits.max_idle_upstreams
        if is_full or pool in self._gone or pool in self._dead:
            connection.abort()
            return
        connection.unused_at = now
        idle = self._idle.get(pool)
        if idle is None:
            self._idle[pool] = [connection]
        else:
            idle.append(connection)
        self.idle += 1

    async def connect(self, slot: Slot) -> AppSide:
        """A new connection. Raises `OSError`, `TimeoutError` or `BadMessage`; no byte was sent."""
        if slot.protocol == H2C:
            return await self._connect_shared(slot)
        connection = await self._open(slot, lambda: Upstream(slot.pool, self))
        if connection.spoke_first:
            raise BadMessage(502, "the app's answer is not HTTP/1.1: it came before the request")
        self._add(connection)
        return connection

    async def _open(self, slot: Slot, make: Callable[[], Opened]) -> Opened:
        if slot.pool in self._dead:
            raise ConnectionResetError(INSTANCE_ENDED)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._limits.connect_timeout_s) as patience:
            self._connecting[patience] = slot.pool
            try:
                _, connection = await loop.create_connection(make, slot.host, slot.port)
            finally:
                del self._connecting[patience]
        return connection

    def _add(self, connection: Upstream | Http2App) -> None:
        if connection.transport.is_closing():
            raise ConnectionResetError("it was closed at once")
        self._all.add(connection)
        self._emptied.clear()
        if connection.pool in self._dead:
            connection.break_off()

    # Connections of HTTP/2

    async def _connect_shared(self, slot: Slot) -> AppSide:
        """A stream of a connection that has room by then, or of a new one. Of all who ask at the
        same time, one opens it."""
        lock = self._opening.setdefault(slot.pool, asyncio.Lock())
        try:
            async with lock:
                stream = self._open_stream(slot.pool)
                if stream is None:
                    connection = await self._open(slot, lambda: Http2App(slot.pool, self))
                    self._add(connection)
                    self._shared.setdefault(slot.pool, []).append(connection)
                    stream = connection.open()
        finally:
            if not lock.locked() and self._opening.get(slot.pool) is lock:
                del self._opening[slot.pool]
        return stream

    def _open_stream(self, pool: str) -> AppStream | None:
        for connection in self._shared.get(pool, ()):
            if connection.has_room:
                return connection.open()
        return None

    # Their ends

    def on_lost(self, connection: Upstream | Http2App) -> None:
        """It is closed."""
        self._all.discard(connection)
        if not self._all:
            self._emptied.set()
        pool = connection.pool
        if isinstance(connection, Upstream):
            idle = self._idle.get(pool)
            if idle is not None and connection in idle:
                idle.remove(connection)
                self.idle -= 1
            return
        shared = [one for one in self._shared.pop(pool, ()) if one is not connection]
        if shared:
            self._shared[pool] = shared

    def close_gone(self, gone: frozenset[str]) -> None:
        """Close what is kept of these pools, and keep nothing of them until the next call."""
        self._gone = gone
        for pool in gone & self._idle.keys():
            self._close(self._idle.pop(pool))
        for pool in gone & self._shared.keys():
            for connection in list(self._shared[pool]):
                connection.go()

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
        for connection in [one for every in self._shared.values() for one in every]:
            if not connection.streams and connection.unused_at < moment:
                connection.go()

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
