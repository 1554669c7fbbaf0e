"""An HTTP/2 connection to an app that speaks h2c, or to another gateway: for many exchanges.

Streams of different sessions share a connection, as their pool is one: the same generation of an
instance. What goes wrong with one stays its own, unless the connection ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from h2.errors import ErrorCodes
from h2.events import Event, InformationalResponseReceived, ResponseReceived

from tabane.gateway.forwarding import Extra, Provenance, encode_request
from tabane.gateway.headers import BadMessage
from tabane.gateway.heads import RequestHead
from tabane.gateway.http1 import Response
from tabane.gateway.http2 import LAST_STREAM, Http2Connection, Stream, new_protocol
from tabane.gateway.http2_heads import (
    Fields,
    Trailers,
    encode_request_fields,
    parse_response_fields,
    parse_trailers,
)
from tabane.gateway.sides import Peer
from tabane.gateway.upstream import INSTANCE_ENDED

if TYPE_CHECKING:
    from tabane.gateway.pools import Pools


class AppStream(Stream):
    """An app's side of an exchange: see `tabane.gateway.sides.AppSide`."""

    connection: Http2App
    is_used = False
    was_refused = False
    was_reset = False

    def __init__(self, connection: Http2App) -> None:
        super().__init__(connection, 0)
        self.reader = Response()
        self.peer: Peer | None = None

    @property
    def is_dead(self) -> bool:
        return self.connection.is_dead

    # Of the exchange.

    def begin(
        self,
        peer: Peer,
        head: RequestHead,
        provenance: Provenance,
        extra: Extra,
        expects_continue: bool,
    ) -> None:
        self.peer = peer
        self.connection.add(self)
        encoded = encode_request(head, provenance, extra, expects_continue)
        fields = encode_request_fields(head, encoded)
        self.send_head(fields, is_end=not head.has_body, opens=True)

    def send(self, pieces: list[bytes], is_end: bool, trailers: Trailers = ()) -> None:
        if pieces or is_end:
            self.send_body(pieces, is_end, trailers)

    def end(self, now: float | None) -> None:
        self.abort()

    def abort(self) -> None:
        self.peer = None
        self.reset(ErrorCodes.CANCEL)

    # Of the connection.

    def on_head(self, fields: Fields, *, ended: bool) -> None:
        """A response's, final or not."""
        reader = self.reader
        reader.has_begun = True
        try:
            head = parse_response_fields(fields)
        except BadMessage as error:
            reader.error = error
        else:
            if head.is_interim:
                reader.interims = [*reader.interims, head]
            else:
                reader.head = head
        if not ended:
            self._tell()

    def on_data(self, data: bytes) -> None:
        self.reader.body.append(data)
        self._tell()

    def on_trailers(self, fields: Fields) -> None:
        try:
            self.reader.trailers = parse_trailers(fields, of_request=False)
        except BadMessage as error:
            self.reader.error = error

    def on_end(self) -> None:
        self.reader.complete = self.reader.error is None
        self._tell()

    def _tell(self) -> None:
        if self.peer is not None:
            self.peer.on_response(self.reader)

    def on_reset(self, code: int) -> None:
        self.was_refused = code == ErrorCodes.REFUSED_STREAM
        self.was_reset = not self.was_refused
        self._lose(f"it reset the stream with {name_of(code)}")

    def on_refused(self) -> None:
        """The app goes, and did not look at this stream."""
        self.was_refused = True
        self._lose("it takes no more streams on this connection")

    def on_connection_lost(self, reason: str) -> None:
        self.is_used = self.connection.was_used
        self._lose(INSTANCE_ENDED if self.is_dead else reason)

    def _lose(self, reason: str) -> None:
        peer, self.peer = self.peer, None
        if peer is not None:
            peer.on_upstream_end(self.reader, reason)

    def on_flow(self) -> None:
        if self.peer is not None:
            self.peer.on_upstream_flow()


class Http2App(Http2Connection):
    """One connection; its pool hands out its streams."""

    __slots__ = ("_pools", "pool", "unused_at", "was_used")

    streams: dict[int, AppStream]  # type: ignore[assignment]

    def __init__(self, pool: str, pools: Pools) -> None:
        super().__init__(new_protocol(is_client=True), pools.now)
        self.pool = pool
        self._pools = pools
        self.was_used = False
        """It has served an exchange before."""
        self.unused_at = pools.now

    @property
    def now(self) -> float:
        return self._pools.now

    @property
    def has_room(self) -> bool:
        """It may carry another stream."""
        h2 = self.h2
        return (
            not self.is_going
            and not self.transport.is_closing()
            and len(self.streams) < h2.remote_settings.max_concurrent_streams
            and h2.highest_outbound_stream_id < LAST_STREAM - 1  # numbers go up by two
        )

    def open(self) -> AppStream:
        """A further stream, which is to be begun at once."""
        return AppStream(self)

    def add(self, stream: AppStream) -> None:
        """Give a stream that begins its number."""
        stream.number = self.h2.get_next_available_stream_id()
        self.streams[stream.number] = stream

    def on_event(self, event: Event) -> None:
        if not isinstance(event, ResponseReceived | InformationalResponseReceived):
            return
        stream = self.streams.get(event.stream_id)
        if stream is not None:
            ended = isinstance(event, ResponseReceived) and event.stream_ended is not None
            stream.on_head(event.headers, ended=ended)

    def on_goaway(self, last_stream: int) -> None:
        self.is_going = True
        refused = [stream for stream in self.streams.values() if stream.number > last_stream]
        for stream in refused:
            self._forget(stream)
            stream.on_refused()
        self._close_if_done()

    def on_forgotten(self) -> None:
        self.was_used = True
        self.unused_at = self._pools.now
        self._close_if_done()

    def go(self) -> None:
        """Carry no further streams, and close when the last is over."""
        self.is_going = True
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self.is_going and not self.streams and not self.transport.is_closing():
            self._flush()
            self.transport.close()

    def eof_received(self) -> bool:
        if self.is_dead:
            self.transport.abort()
        self.lose_streams("the app closed the connection")
        return False

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._pools.on_lost(self)


def name_of(code: int) -> str:
    try:
        return ErrorCodes(code).name
    except ValueError:
        return f"the code {code}"
