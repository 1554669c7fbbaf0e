"""After a 101: bytes both ways between client and app, each direction closed on its own."""

from __future__ import annotations

from collections.abc import Callable

from tabane.gateway.flow import Flow
from tabane.gateway.upstream import Upstream


class _End(Flow):
    """One of the two connections."""

    __slots__ = ("bytes", "other", "tunnel", "was_closed")

    other: _End

    def __init__(self, tunnel: Tunnel, flow: Flow) -> None:
        super().__init__()
        self.tunnel = tunnel
        self.transport = flow.transport
        self.is_full = flow.is_full
        self.is_dead = flow.is_dead
        self.reads = flow.reads
        self.bytes = 0
        self.was_closed = False
        """The other side of this connection sends no more."""

    def data_received(self, data: bytes) -> None:
        self.bytes += len(data)
        self.tunnel.on_bytes()
        if data and not self.other.transport.is_closing():
            self.other.transport.write(data)

    def eof_received(self) -> bool:
        if self.is_dead:
            self.transport.abort()
            return False
        self.was_closed = True
        if self.other.was_closed:
            self.tunnel.close()
            return False
        if not self.other.transport.is_closing():
            self.other.transport.write_eof()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self.tunnel.on_lost(self)

    def on_flow(self) -> None:
        self.other.read(not self.is_full)


class Tunnel:
    """Made from two connections. `abort` ends it at once; each side may end it in good order."""

    def __init__(
        self, client: Flow, upstream: Upstream, idle_s: float, now: Callable[[], float]
    ) -> None:
        self.pool = upstream.pool
        self._idle_s = idle_s
        self._now = now
        self._ends = (_End(self, client), _End(self, upstream))
        self._open = 2
        self.deadline = now() + idle_s

    def begin(self, from_client: bytes, from_upstream: bytes, on_end: Callable[[], None]) -> None:
        """Take over, first passing on what each side sent already; call `on_end` when both are
        closed."""
        self._on_end = on_end
        client, upstream = self._ends
        client.other, upstream.other = upstream, client
        for end in self._ends:
            end.transport.set_protocol(end)
        client.data_received(from_client)
        upstream.data_received(from_upstream)
        for end in self._ends:
            end.read(not end.other.is_full)

    def on_bytes(self) -> None:
        self.deadline = self._now() + self._idle_s

    def on_lost(self, end: _End) -> None:
        """One connection is gone: the other follows when it has taken what is on its way."""
        self._open -= 1
        if self._open == 0:
            self._on_end()
        else:
            end.other.transport.close()

    def break_off(self) -> None:
        """The app's instance ended: the client gets what it sent, and its connection is closed."""
        self._ends[1].break_off()

    def close(self) -> None:
        for end in self._ends:
            end.transport.close()

    @property
    def from_client_bytes(self) -> int:
        return self._ends[0].bytes

    @property
    def from_app_bytes(self) -> int:
        return self._ends[1].bytes

    def on_deadline(self) -> None:
        self.abort()

    def leave_if_idle(self) -> None:
        """A tunnel is never idle: it is a session until it closes."""

    def abort(self) -> None:
        for end in self._ends:
            end.transport.abort()
