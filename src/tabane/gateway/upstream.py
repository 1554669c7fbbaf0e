"""Connections of HTTP/1.1 to apps (or to other gateways).

The invariant that no response reaches a wrong request: a connection serves at most one exchange at
a time, from `begin` to `end`, and what it reads goes to that exchange or nowhere. It is kept after
`end` only when the request was sent whole, the response was read whole with nothing behind it, and
the app means to keep it; a byte that comes while it serves nobody closes it. Only slots of the pool
it was made for get it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tabane.gateway.flow import Flow
from tabane.gateway.forwarding import LAST_CHUNK, Extra, Provenance, encode_chunk, encode_request
from tabane.gateway.heads import RequestHead
from tabane.gateway.http1 import ResponseReader
from tabane.gateway.sides import Peer, Trailers

if TYPE_CHECKING:
    from tabane.gateway.pools import Pools

INSTANCE_ENDED = "its instance ended"


class Upstream(Flow):
    """One connection of HTTP/1.1 to an app: see `tabane.gateway.sides.AppSide`."""

    __slots__ = (
        *("_chunked", "_head", "_pools"),
        *("is_used", "peer", "pool", "reader", "spoke_first", "unused_at"),
    )

    was_refused = was_reset = False

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
        assert self.peer is None
        self.peer = peer
        self.reader = ResponseReader(head.method)
        out = encode_request(head, provenance, extra, expects_continue)
        if head.has_body:
            self._chunked = head.chunked
            self._head = out
        else:
            self.transport.write(out)

    def send(self, pieces: list[bytes], is_end: bool, trailers: Trailers = ()) -> None:
        out, self._head = self._head, b""
        if pieces:
            out += encode_chunk(pieces) if self._chunked else b"".join(pieces)
        if is_end and self._chunked:
            out += LAST_CHUNK
        if out:
            self.transport.write(out)

    def end(self, now: float | None) -> None:
        """Serve nobody: whatever still comes is not for the last peer."""
        self.peer = None
        self.is_used = True
        reader = self.reader
        if now is None or not reader.is_reusable or self.transport.is_closing():
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
