"""One connection from a client: its requests, one at a time, each answered before the next begins.

Bytes are read as long as they are wanted: not while a request waits behind another (pipelining),
nor while an app takes no more of a body. A client that closes its side is taken to have left, as
browsers, curl and most proxies mean it; while nobody reads, the sweep asks the kernel.

It is closed by `leave`: our end first, then what still comes is thrown away for a moment, for a
plain close with unread bytes would reset the connection and take the last answer along (RFC 9112
section 9.6).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from tabane.gateway.exchange import Exchange
from tabane.gateway.flow import Flow
from tabane.gateway.forwarding import (
    LAST_CHUNK,
    NO_ANSWER,
    Provenance,
    encode_chunk,
    encode_interim,
    encode_response,
    provenance_of,
)
from tabane.gateway.heads import ResponseHead
from tabane.gateway.http1 import PREFACE, REPLAY_BYTES, RequestReader
from tabane.gateway.http2_client import Http2Client
from tabane.gateway.replies import Reply, encode_reply, reply_for
from tabane.gateway.sides import Trailers
from tabane.gateway.tunnel import Tunnel
from tabane.gateway.upstream import Upstream

if TYPE_CHECKING:
    from tabane.gateway.http import HttpGateway

FRESH_S = 1.0
"""A connection just made has so long to send its first request when the gateway drains."""
NOT_NOW = Reply(400, "bad_message", "a connection of HTTP/1.1 cannot go on with HTTP/2")
TOO_MANY = Reply(503, "busy", "this gateway has too many connections, try again soon", 1.0)


class Client(Flow):
    """Made by the gateway for each connection it accepts."""

    __slots__ = (
        "_answer",
        "_begins",
        "_in_head",
        "_is_fresh",
        "_leaves",
        "deadline",
        "exchange",
        "gateway",
        "provenance",
        "reader",
    )

    provenance: Provenance

    def __init__(self, gateway: HttpGateway) -> None:
        super().__init__()
        self.gateway = gateway
        self.reader = RequestReader()
        self.exchange: Exchange | None = None
        self.deadline = gateway.now + gateway.limits.header_timeout_s
        """When `on_deadline` is due."""
        self._answer = NO_ANSWER
        self._begins = False
        self._in_head = False
        self._is_fresh = True
        self._leaves = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        gateway = self.gateway
        peer = transport.get_extra_info("peername")
        name = peer[0] if isinstance(peer, tuple) else "unknown"
        self.provenance = provenance_of(name, gateway.scheme, gateway.forward)
        if not gateway.admit(self):
            self.reply(TOO_MANY, None)

    @property
    def is_deaf(self) -> bool:
        """A request is in flight and nobody reads: the client might leave unseen."""
        return not self.reads and self.exchange is not None

    # Bytes come.

    def data_received(self, data: bytes) -> None:
        if self._leaves:
            return
        self.gateway.counters.received_bytes += len(data)
        reader, exchange = self.reader, self.exchange
        reader.feed(data)
        if exchange is None:
            self._begin_next()
        else:
            exchange.on_request_data(reader.error)
        request = reader.request
        if request is not None and (reader.rest or not request.complete):
            self.balance()

    def _begin_next(self) -> None:
        """Begin with the requests that wait, until one is in flight or none is left."""
        if self._begins:
            return
        self._begins = True
        reader, gateway = self.reader, self.gateway
        while self.exchange is None and not self._leaves:
            if (request := reader.request) is not None:
                gateway.counters.requests += 1
                gateway.counters.active += 1
                self._in_head = self._is_fresh = False
                self.exchange = exchange = Exchange(self, request)
                if reader.error is not None and not request.complete:
                    exchange.on_request_data(reader.error)
                else:
                    exchange.begin()
            elif reader.error is not None:
                self.reply(reply_for(reader.error), None)
            elif reader.is_http2:
                self._change_to_http2()
            else:
                self._await_head()
                break
        self._begins = False

    def _change_to_http2(self) -> None:
        if not self._is_fresh:
            self.reply(NOT_NOW, None)
            return
        self._leaves = True
        successor = Http2Client(self)
        self.gateway.replace(self, successor)
        successor.begin(PREFACE + self.reader.rest)

    def _await_head(self) -> None:
        if self.reader.in_head and not self._in_head:
            self._in_head = True
            self.deadline = self.gateway.now + self.gateway.limits.header_timeout_s

    def balance(self) -> None:
        """Read on, or stop reading, as is right now."""
        exchange = self.exchange
        blocked = len(self.reader.rest) > REPLAY_BYTES or (
            exchange is not None and exchange.blocks_reading
        )
        self.read(self._leaves or not blocked)

    # Answers go.

    def write(self, data: bytes) -> None:
        self.gateway.counters.sent_bytes += len(data)
        self.transport.write(data)

    def respond_interim(self, head: ResponseHead) -> None:
        """Pass on a 1xx response."""
        self.write(encode_interim(head))

    def respond(
        self,
        head: ResponseHead | None,
        pieces: list[bytes],
        is_end: bool,
        trailers: Trailers = (),
    ) -> None:
        """Pass on the final response: its head, if that is not out, and more of its body."""
        out = b""
        if head is not None:
            request, gateway = self.reader.request, self.gateway
            assert request is not None
            wanted = request.head.keep_alive and request.complete and not gateway.draining
            self._answer = encode_response(request.head, head, wanted)
            out = self._answer.head
        if pieces:
            out += encode_chunk(pieces) if self._answer.chunked else b"".join(pieces)
        if is_end and self._answer.chunked:
            out += LAST_CHUNK
        if out:
            self.gateway.counters.sent_bytes += len(out)
            self.transport.write(out)

    def reply(self, reply: Reply, exchange: Exchange | None, *, refused: bool = False) -> None:
        """Answer in the gateway's own name: to a request, or to what cannot be one."""
        request = exchange.request if exchange is not None else None
        keep_alive = (
            request is not None
            and request.complete
            and request.head.keep_alive
            and not self.gateway.draining
        )
        connection = b"" if keep_alive else b"close"
        if request is not None and keep_alive and request.head.is_http_1_0:
            connection = b"keep-alive"
        is_head = request is not None and request.head.method == b"HEAD"
        if exchange is None:
            self.gateway.counters.responses[reply.status // 100] += 1
        self.write(encode_reply(reply, connection=connection, is_head=is_head, refused=refused))
        self._go_on(keep_alive=keep_alive)

    def on_done(self) -> None:
        """The request in flight is answered."""
        gateway, reader = self.gateway, self.reader
        if reader.rest or gateway.draining or not self._answer.keep_alive or not self.reads:
            self._go_on(keep_alive=self._answer.keep_alive)
            return
        self.exchange = reader.request = None
        self.deadline = gateway.now + gateway.limits.idle_timeout_s

    def _go_on(self, *, keep_alive: bool) -> None:
        """Go on with the next request, or leave."""
        self.exchange = None
        if not keep_alive or self.gateway.draining:
            self.leave()
            return
        self.deadline = self.gateway.now + self.gateway.limits.idle_timeout_s
        reader = self.reader
        reader.resume()
        if reader.request is not None or reader.error is not None or reader.in_head:
            self._begin_next()
        if not self.reads:
            self.balance()

    def open_tunnel(
        self, upstream: Upstream, from_app: bytes, on_end: Callable[[Tunnel], None]
    ) -> None:
        """A tunnel has both transports from now on, and begins with what came `from_app`."""
        gateway = self.gateway
        upstream.hand_over()
        tunnel = Tunnel(self, upstream, gateway.limits.stream_idle_timeout_s, lambda: gateway.now)
        self.exchange = None
        self._leaves = True
        gateway.replace(self, tunnel)
        tunnel.begin(self.reader.rest, from_app, lambda: on_end(tunnel))

    # The end.

    def leave(self) -> None:
        """Close in good order. Idempotent."""
        if self._leaves:
            return
        self._leaves = True
        self.deadline = self.gateway.now + self.gateway.limits.linger_s
        self._waiting_bytes = sys.maxsize
        if not self.transport.is_closing():
            self.transport.write_eof()
            self.read(True)

    def leave_if_idle(self) -> None:
        """The gateway drains: leave, unless a request is in flight or on its way."""
        if self._is_fresh:
            self.deadline = min(self.deadline, self.gateway.now + FRESH_S)
        elif self.exchange is None and not self.reader.in_head:
            self.leave()

    def abort(self) -> None:
        """Close at once; what was not sent yet is lost, and the client can tell. Idempotent."""
        self._leaves = True
        self.transport.abort()

    def cut(self) -> None:
        """Close with a reset: what was sent is not the whole answer, and must not seem so."""
        self._leaves = True
        super().cut()

    def eof_received(self) -> bool:
        if self.exchange is not None:
            self.on_left()
        self._leaves = True
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._leaves = True
        if self.exchange is not None:
            self.exchange.abandon()
            self.exchange = None
        self.gateway.forget(self)

    def on_left(self) -> None:
        """The client closed its side: nobody waits for the answer."""
        if self.exchange is not None:
            self.exchange.abandon()
            self.exchange = None
        self.abort()

    def on_flow(self) -> None:
        if self.exchange is not None:
            self.exchange.on_client_flow()

    def on_deadline(self) -> None:
        """What must happen next did not within its time."""
        if self._leaves:
            self._on_linger_end()
        elif self.exchange is not None:
            self.exchange.on_deadline()
        elif self.reader.in_head:
            self.reply(Reply(408, "timed_out", "the request's head did not come in time"), None)
        else:
            self.leave()

    def _on_linger_end(self) -> None:
        """A last answer that still moves gets the time it needs."""
        if self.transport.get_write_buffer_size() and self.has_moved():
            self.deadline = self.gateway.now + self.gateway.limits.body_idle_timeout_s
        else:
            self.abort()
