"""An HTTP/2 connection from a client: each stream is a session, as a request of HTTP/1.1 is.

It begins with the connection's preface: the client knows that this port speaks HTTP/2, as gRPC
clients, other gateways and `curl --http2-prior-knowledge` do.

It is closed in two steps (RFC 9113 section 6.8): a GOAWAY that names no stream, and once the client
has surely read it (it answers a ping), one that names the last; what came in between is served.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from h2.errors import ErrorCodes
from h2.events import Event, PingAckReceived, RequestReceived

from tabane.gateway.exchange import Exchange
from tabane.gateway.forwarding import Provenance, encode_interim, encode_response
from tabane.gateway.headers import BadMessage
from tabane.gateway.heads import RequestHead, ResponseHead
from tabane.gateway.http1 import Request
from tabane.gateway.http2 import LAST_STREAM, MAX_STREAMS, Http2Connection, Stream, new_protocol
from tabane.gateway.http2_heads import (
    Fields,
    Trailers,
    encode_reply_fields,
    encode_response_fields,
    is_grpc,
    parse_request_fields,
    parse_trailers,
)
from tabane.gateway.replies import Reply, reply_for
from tabane.gateway.tunnel import Tunnel
from tabane.gateway.upstream import Upstream

if TYPE_CHECKING:
    from tabane.gateway.client import Client
    from tabane.gateway.http import HttpGateway

GOING_PING = b"tabane\0\0"
FRESH_S = 1.0
"""How long a client may take to have read that the gateway drains."""


class ClientStream(Stream):
    """A client's side of an exchange: see `tabane.gateway.sides.ClientSide`."""

    connection: Http2Client

    def __init__(self, connection: Http2Client, number: int, to_grpc: bool) -> None:
        super().__init__(connection, number)
        self.gateway = connection.gateway
        self.provenance = connection.provenance
        self.exchange: Exchange | None = None
        self.deadline = 0.0
        self._to_grpc = to_grpc

    def begin(self, head: RequestHead, ended: bool) -> None:
        counters = self.gateway.counters
        counters.requests += 1
        counters.active += 1
        self.was_ended = ended
        self.exchange = exchange = Exchange(self, Request(head))
        exchange.begin()

    # Of the exchange.

    def balance(self) -> None:
        self.read(self.exchange is None or not self.exchange.blocks_reading)

    def respond_interim(self, head: ResponseHead) -> None:
        self.send_head(encode_response_fields(head.status, encode_interim(head)), is_end=False)

    def respond(
        self,
        head: ResponseHead | None,
        pieces: list[bytes],
        is_end: bool,
        trailers: Trailers = (),
    ) -> None:
        if head is not None:
            assert self.exchange is not None
            answer = encode_response(self.exchange.request.head, head, True)
            is_all = is_end and not pieces and not trailers
            self.send_head(encode_response_fields(head.status, answer.head), is_end=is_all)
            if is_all:
                return
        self.send_body(pieces, is_end, trailers)

    def reply(self, reply: Reply, exchange: Exchange | None, *, refused: bool = False) -> None:
        """Answer in the gateway's own name."""
        is_head = exchange is not None and exchange.request.head.method == b"HEAD"
        fields, body = encode_reply_fields(
            reply, is_head=is_head, to_grpc=self._to_grpc, refused=refused
        )
        if exchange is None:
            self.gateway.counters.responses[reply.status // 100] += 1
        self.send_head(fields, is_end=not body)
        if body:
            self.send_body([body], True)
        self.on_done()

    def open_tunnel(
        self, upstream: Upstream, from_app: bytes, on_end: Callable[[Tunnel], None]
    ) -> None:
        raise AssertionError("a request of HTTP/2 asks for no other protocol")

    def on_done(self) -> None:
        """The exchange is over; what is queued still goes."""
        self.exchange = None
        self.deadline = self.gateway.now + self.gateway.limits.body_idle_timeout_s
        self.connection.budget.earn()
        self.connection.settle(self)

    def cut(self) -> None:
        """What was sent is not the whole answer."""
        self.exchange = None
        self.reset(ErrorCodes.INTERNAL_ERROR)

    # Of the connection.

    def on_data(self, data: bytes) -> None:
        self.gateway.counters.received_bytes += len(data)
        exchange = self.exchange
        if exchange is None or exchange.request.complete:
            return
        request = exchange.request
        request.body.append(data)
        request.buffered += len(data)
        exchange.on_request_data(None)
        self.balance()

    def on_trailers(self, fields: Fields) -> None:
        if self.exchange is None:
            return
        try:
            self.exchange.request.trailers = parse_trailers(fields, of_request=True)
        except BadMessage as error:
            self.exchange.on_request_data(error)

    def on_end(self) -> None:
        if self.exchange is not None and not self.exchange.request.complete:
            self.exchange.request.complete = True
            self.exchange.on_request_data(None)

    def on_reset(self, code: int) -> None:
        self.abandon()

    def on_connection_lost(self, reason: str) -> None:
        self.abandon()

    def abandon(self) -> None:
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.abandon()

    def on_flow(self) -> None:
        if self.exchange is not None:
            self.exchange.on_client_flow()

    def on_deadline(self) -> None:
        if self.exchange is not None:
            self.exchange.on_deadline()
        elif self.has_moved():
            self.deadline = self.gateway.now + self.gateway.limits.body_idle_timeout_s
        else:
            self.reset(ErrorCodes.CANCEL)


class Http2Client(Http2Connection):
    """Takes a connection over from a `Client` that saw the preface."""

    __slots__ = ("_told_last", "deadline", "gateway", "provenance")

    streams: dict[int, ClientStream]  # type: ignore[assignment]

    def __init__(self, client: Client) -> None:
        self.gateway: HttpGateway = client.gateway
        super().__init__(new_protocol(is_client=False), self.gateway.now)
        self.provenance: Provenance = client.provenance
        self.transport = client.transport
        self.is_full = client.is_full
        self.deadline = self.gateway.now + self.gateway.limits.header_timeout_s
        self._told_last = False

    @property
    def now(self) -> float:
        return self.gateway.now

    def begin(self, data: bytes) -> None:
        """What came already, the preface first."""
        self.transport.set_protocol(self)
        self.data_received(data)
        if self.gateway.draining:
            self.leave_if_idle()

    def on_event(self, event: Event) -> None:
        if isinstance(event, RequestReceived):
            ended = event.stream_ended is not None
            self._on_request(event.stream_id, event.headers, ended=ended)
        elif isinstance(event, PingAckReceived) and event.ping_data == GOING_PING:
            self._tell_last()

    def _on_request(self, number: int, fields: Fields, *, ended: bool) -> None:
        if self._told_last or len(self.streams) >= MAX_STREAMS:
            self.h2.reset_stream(number, ErrorCodes.REFUSED_STREAM)
            self.spend()
            return
        stream = self.streams[number] = ClientStream(self, number, is_grpc(fields))
        self.deadline = 0.0  # of each stream, from now on
        try:
            head = parse_request_fields(fields, ended)
        except BadMessage as error:
            stream.was_ended = ended
            stream.reply(reply_for(error), None)
        else:
            stream.begin(head, ended)

    def settle(self, stream: Stream) -> None:
        """A stream whose answer is out is over, even if its request is not."""
        super().settle(stream)
        is_over = stream.has_sent_all and cast(ClientStream, stream).exchange is None
        if is_over and stream.number in self.streams:
            self.drop(stream, ErrorCodes.NO_ERROR)

    def on_forgotten(self) -> None:
        if self.streams:
            return
        self.deadline = self.now + self.gateway.limits.idle_timeout_s
        if self._told_last:
            self._close()

    def on_sent(self, size: int) -> None:
        self.gateway.counters.sent_bytes += size

    # Of the gateway's sweep.

    def on_deadline(self) -> None:
        """Look at all streams; without any, the connection was idle for too long."""
        if self.transport.is_closing():
            self.abort()
        elif not self.streams:
            if not self._told_last:
                self._tell_last()
            else:
                self.abort()
        now = self.now
        for stream in list(self.streams.values()):
            if stream.deadline <= now:
                stream.on_deadline()

    def leave_if_idle(self) -> None:
        """The gateway drains: no further streams."""
        if self.is_going:
            return
        self.say_goaway(LAST_STREAM)
        self.h2.ping(GOING_PING)
        self.pump_soon()
        if not self.streams:
            self.deadline = self.now + FRESH_S

    def _tell_last(self) -> None:
        if self._told_last:
            return
        self._told_last = True
        self.say_goaway(self.h2.highest_inbound_stream_id)
        if not self.streams:
            self._close()

    def _close(self) -> None:
        """All is answered: close once it is out, or soon."""
        self._flush()
        self.deadline = self.now + self.gateway.limits.linger_s
        self.transport.close()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.gateway.forget(self)
