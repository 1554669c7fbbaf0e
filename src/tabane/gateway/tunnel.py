"""Bytes both ways between client and app: after a 101, and all of a TCP session.

What one side does (an end, a reset, taking no more for now), the other one sees. Each direction is
closed on its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from tabane.gateway.flow import Flow

if TYPE_CHECKING:
    from tabane.gateway.tcp_ends import Dialed
    from tabane.gateway.upstream import Upstream

LINGER_S = 2.0
"""What was idle for too long has so long to take what is on its way to it."""
HALF_CLOSED_S = 3600.0
"""One side has ended and the other one is silent: it may compute, but not for ever, as a client
that closed its connection looks the same as one that only has nothing more to say."""


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
        if data and not self.bytes:
            self.tunnel.on_first(self)
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
        self.tunnel.on_bytes()
        if not self.other.transport.is_closing():
            self.other.transport.write_eof()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self.tunnel.on_lost(self, error)

    def on_flow(self) -> None:
        if not self.other.was_closed:
            self.other.read(not self.is_full)


class Tunnel:
    """Made from two connections. `abort` ends it at once; each side may end it in good order.

    `idle_s`: after so long without a byte either way it is closed; None: never. `on_first` is
    called with the app's first byte.
    """

    def __init__(
        self,
        client: Flow,
        upstream: Upstream | Dialed,
        idle_s: float | None,
        now: Callable[[], float],
        on_first: Callable[[], None] = lambda: None,
    ) -> None:
        self.pool = upstream.pool
        self._idle_s = math.inf if idle_s is None else idle_s
        self._now = now
        self._on_first = on_first
        self._ends = (_End(self, client), _End(self, upstream))
        self._open = 2
        self._is_closing = False
        self.deadline = now() + self._idle_s

    def begin(
        self,
        from_client: bytes,
        from_upstream: bytes,
        on_end: Callable[[], None],
        *,
        client_ended: bool = False,
        upstream_ended: bool = False,
    ) -> None:
        """Take over, first passing on what each side sent already, and their ends; call `on_end`
        when both are closed."""
        self._on_end = on_end
        client, upstream = self._ends
        client.other, upstream.other = upstream, client
        for end in self._ends:
            end.transport.set_protocol(end)
        client.data_received(from_client)
        upstream.data_received(from_upstream)
        for end, has_ended in ((client, client_ended), (upstream, upstream_ended)):
            if has_ended and not end.eof_received():
                end.transport.close()
        for end in self._ends:
            if not end.was_closed:
                end.read(not end.other.is_full)

    def on_first(self, end: _End) -> None:
        if end is self._ends[1]:
            self._on_first()

    def on_bytes(self) -> None:
        half_closed = self._ends[0].was_closed or self._ends[1].was_closed
        self.deadline = self._now() + (
            min(self._idle_s, HALF_CLOSED_S) if half_closed else self._idle_s
        )

    def on_lost(self, end: _End, error: Exception | None) -> None:
        """One connection is gone: the other follows when it has taken what is on its way, or at
        once if it broke off."""
        self._open -= 1
        if self._open == 0:
            self._on_end()
        elif error is not None:
            end.other.cut()
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
        if self._is_closing:
            self.abort()
        else:
            self._is_closing = True
            self.deadline = self._now() + LINGER_S
            self.close()

    def leave_if_idle(self) -> None:
        """A tunnel is never idle: it is a session until it closes."""

    def abort(self) -> None:
        for end in self._ends:
            end.cut()
