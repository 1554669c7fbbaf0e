"""One HTTP/2 connection, to a client or to an app: many streams, each an exchange of its own.

The `h2` library does the protocol; here are the streams' bytes, which go and come under four rules.

- What a stream has to send waits in its own queue, is sent in turn with the others' as far as the
  other side's windows and the kernel take it, and a queue that is long makes its source stop
  (`is_full`): a stream that nobody reads holds up none but itself.
- What a stream receives opens its window again only while somebody wants more of it (`read`), but
  the connection's window at once: so a connection holds no more unread than a window for each
  of its streams.
- All that was written in one turn of the event loop goes out in one write.
- Frames that bring nothing are paid for (`http2_budget`).

GOAWAY is kept from `h2`, for which a connection is over with it, while streams go on to their ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    PingReceived,
    PriorityUpdated,
    RemoteSettingsChanged,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    UnknownFrameReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from hyperframe.frame import Frame, GoAwayFrame

from tabane.gateway.flow import Flow
from tabane.gateway.http2_budget import FrameBudget
from tabane.gateway.http2_heads import LIST_BYTES, Fields, Trailers

log = logging.getLogger(__name__)

HIGH_BYTES, LOW_BYTES = 64 << 10, 16 << 10
"""A queue is full from the one on until it is down to the other, as asyncio's transports are."""
CHUNK_BYTES = 64 << 10
"""So much is encoded before it is written, so that a full transport is noticed."""
WINDOW_BYTES = 65_535
CONNECTION_WINDOW_BYTES = 1 << 20
MAX_STREAMS = 100
"""At once, of one client: what RFC 9113 section 6.5.2 names as the least that is reasonable."""
LAST_STREAM = (1 << 31) - 1
USEFUL_BYTES = 512
"""A frame with so much of a body was worth its handling."""
UPDATES = 2
"""Of windows, for a frame that was sent: the stream's and the connection's."""
COSTLY = (PingReceived, PriorityUpdated, RemoteSettingsChanged, StreamReset, UnknownFrameReceived)


class GoingProtocol(H2Connection):
    """`h2` with little memory of what was, and two things that do not end all that is under way: a
    GOAWAY, and a stream too many, which `Http2Client` refuses."""

    MAX_CLOSED_STREAMS = 1024

    @property
    def open_inbound_streams(self) -> int:
        return min(super().open_inbound_streams, MAX_STREAMS - 1)

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        told = ConnectionTerminated()
        told.error_code = frame.error_code
        told.last_stream_id = frame.last_stream_id
        return [], [told]


def new_protocol(*, is_client: bool) -> H2Connection:
    config = H2Configuration(
        client_side=is_client,
        header_encoding=None,
        validate_inbound_headers=False,  # `http2_heads` does
        validate_outbound_headers=False,
    )
    h2 = GoingProtocol(config)
    values: dict[SettingCodes, int] = {
        SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
        SettingCodes.MAX_HEADER_LIST_SIZE: LIST_BYTES,
        SettingCodes.INITIAL_WINDOW_SIZE: WINDOW_BYTES,
    }
    if is_client:
        values[SettingCodes.ENABLE_PUSH] = 0
    h2.local_settings = Settings(is_client, initial_values=values)
    h2.initiate_connection()
    h2.increment_flow_control_window(CONNECTION_WINDOW_BYTES - WINDOW_BYTES)
    return h2


class Stream:
    """One stream's bytes both ways. What it serves is a subclass's affair."""

    def __init__(self, connection: Http2Connection, number: int) -> None:
        self.connection = connection
        self.number = number
        self.is_full = False
        self.reads = True
        self.was_ended = False
        """The other side has sent its last."""
        self._queue: deque[memoryview] = deque()
        self._queued_bytes = 0
        self._moved = False
        self._is_last = False
        """What waits is the last to be sent,"""
        self._trailers: Fields = []
        """and then these."""
        self._has_sent_end = False
        self._unread_bytes = 0
        self._unacknowledged_bytes = 0

    @property
    def is_open(self) -> bool:
        """As far as `h2` knows, which has read on: what it has seen may still be to come."""
        stream = self.connection.h2.streams.get(self.number)
        return stream is not None and not stream.closed

    # What is sent.

    def send_head(self, fields: Fields, *, is_end: bool, opens: bool = False) -> None:
        if opens or self.is_open:
            self.connection.h2.send_headers(self.number, fields, end_stream=is_end)
        self._has_sent_end = is_end
        self.connection.pump_soon()

    def send_body(self, pieces: list[bytes], is_end: bool, trailers: Trailers = ()) -> None:
        """More of the body, to be sent when it may; `is_end`: the last of it, and the trailers."""
        for piece in pieces:
            if piece:
                self._queue.append(memoryview(piece))
                self._queued_bytes += len(piece)
        if is_end:
            self._is_last = True
            self._trailers = list(trailers)
        if not self.is_full and self._queued_bytes > HIGH_BYTES:
            self.is_full = True
            self.on_flow()
        self.connection.make_ready(self)

    @property
    def wants_to_send(self) -> bool:
        return not self._has_sent_end and (self._is_last or self._queued_bytes > 0)

    @property
    def has_sent_all(self) -> bool:
        return self._has_sent_end

    def send_some(self, most: int) -> int | None:
        """Encode one frame, of at most so many bytes of body, and say how many they are. None: a
        window is closed."""
        h2, budget = self.connection.h2, self.connection.budget
        if not self.is_open:
            return None
        if not self._queue:
            self._send_end()
            return 0
        size = min(most, h2.local_flow_control_window(self.number))
        if size <= 0:
            return None
        piece = self._take(size)
        is_end = self._is_last and not self._queue and not self._trailers
        h2.send_data(self.number, piece, end_stream=is_end)
        self._has_sent_end = is_end
        self._moved = True
        if len(piece) >= USEFUL_BYTES or not self._queue:
            budget.earn(UPDATES)
        if self.is_full and self._queued_bytes <= LOW_BYTES:
            self.is_full = False
            self.on_flow()
        return len(piece)

    def _take(self, most: int) -> bytes:
        """The next bytes of the queue."""
        taken: list[memoryview] = []
        size = 0
        while self._queue and size < most:
            piece = self._queue[0]
            if len(piece) > most - size:
                self._queue[0], piece = piece[most - size :], piece[: most - size]
            else:
                self._queue.popleft()
            taken.append(piece)
            size += len(piece)
        self._queued_bytes -= size
        return b"".join(taken)

    def _send_end(self) -> None:
        self._has_sent_end = True
        if self._trailers:
            self.connection.h2.send_headers(self.number, self._trailers, end_stream=True)
        else:
            self.connection.h2.end_stream(self.number)

    def has_moved(self) -> bool:
        """Bytes were taken since the last call."""
        moved, self._moved = self._moved, False
        return moved

    # What comes.

    def on_data(self, data: bytes) -> None:
        """A piece of the body."""
        raise NotImplementedError

    def on_trailers(self, fields: Fields) -> None:
        raise NotImplementedError

    def on_end(self) -> None:
        """The other side has sent its last."""
        raise NotImplementedError

    def on_reset(self, code: int) -> None:
        """The other side has given it up."""
        raise NotImplementedError

    def on_connection_lost(self, reason: str) -> None:
        raise NotImplementedError

    def on_flow(self) -> None:
        """`is_full` changed."""

    def read(self, on: bool) -> None:
        """Let more come, or let the other side wait once its window is used up. Idempotent."""
        self.reads = on
        if on and self._unread_bytes:
            unread, self._unread_bytes = self._unread_bytes, 0
            self.acknowledge(unread)

    def take_in(self, event: DataReceived) -> None:
        size = event.flow_controlled_length
        self._unread_bytes += size
        self.connection.acknowledge(size)
        if event.data:
            self.on_data(event.data)
        if self.reads:
            self.read(True)

    def acknowledge(self, size: int) -> None:
        self._unacknowledged_bytes += size
        if self._unacknowledged_bytes < WINDOW_BYTES // 2 or self.was_ended:
            return
        more, self._unacknowledged_bytes = self._unacknowledged_bytes, 0
        if self.is_open:
            self.connection.h2.increment_flow_control_window(more, self.number)
            self.connection.pump_soon()

    # Its end.

    def reset(self, code: ErrorCodes) -> None:
        """Give it up, both ways. Idempotent."""
        self._queue.clear()
        self._queued_bytes = 0
        self.connection.drop(self, code)


class Http2Connection(Flow):
    """See the module's text. `now` and the like are a subclass's."""

    __slots__ = (
        *("_has_pump", "_ready", "_unacknowledged_bytes"),
        *("budget", "h2", "is_going", "streams"),
    )

    def __init__(self, h2: H2Connection, now: float) -> None:
        super().__init__()
        self.h2 = h2
        self.streams: dict[int, Stream] = {}
        self.budget = FrameBudget(now)
        self.is_going = False
        """No further streams are to be opened: a GOAWAY went, or an app's came."""
        self._ready: dict[Stream, None] = {}
        """Streams that may have something that can be sent, in their order."""
        self._has_pump = False
        self._unacknowledged_bytes = 0

    @property
    def now(self) -> float:
        raise NotImplementedError

    # Bytes come.

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        try:
            events = self.h2.receive_data(data)
        except ProtocolError as error:
            self._break(int(error.error_code), f"the other side broke HTTP/2: {error}")
            return
        for event in events:
            self._hear(event)
            if self.transport.is_closing():
                return
        self.pump_soon()

    def spend(self) -> None:
        """The other side sent something for nothing; it may do so for a while."""
        if not self.budget.spend(self.now):
            self._break(ErrorCodes.ENHANCE_YOUR_CALM, "the other side sends frames for nothing")

    def _hear(self, event: Event) -> None:
        """Act on an event."""
        if isinstance(event, DataReceived):
            return self._on_data(event)
        if isinstance(event, WindowUpdated):
            self._on_window(event.stream_id or 0)
            return self.spend()
        if isinstance(event, COSTLY):
            self.spend()
        stream = self.streams.get(getattr(event, "stream_id", None) or 0)
        if isinstance(event, RemoteSettingsChanged):
            self._on_window(0)
        elif isinstance(event, ConnectionTerminated):
            self.on_goaway(event.last_stream_id or 0)
        elif stream is None:
            self.on_event(event)
        elif isinstance(event, TrailersReceived):
            stream.on_trailers(event.headers)
        elif isinstance(event, StreamEnded):
            self._on_end(stream)
        elif isinstance(event, StreamReset):
            self._forget(stream)
            stream.on_reset(int(event.error_code or 0))
        else:
            self.on_event(event)

    def _on_data(self, event: DataReceived) -> None:
        stream = self.streams.get(event.stream_id or 0)
        if stream is None:
            self.acknowledge(event.flow_controlled_length or 0)
            self.spend()
            return
        stream.take_in(event)
        if len(event.data) >= USEFUL_BYTES:
            self.budget.earn()
        elif not event.data and event.stream_ended is None:
            self.spend()

    def _on_end(self, stream: Stream) -> None:
        stream.was_ended = True
        stream.on_end()
        self.settle(stream)

    def _on_window(self, number: int) -> None:
        for stream in [self.streams.get(number)] if number else list(self.streams.values()):
            if stream is not None and stream.wants_to_send:
                self._ready[stream] = None

    def on_event(self, event: Event) -> None:
        """Something else: a request, a response."""

    def on_goaway(self, last_stream: int) -> None:
        """The other side takes no streams beyond this one."""

    def acknowledge(self, size: int) -> None:
        """Open the connection's window by what came."""
        self._unacknowledged_bytes += size
        if self._unacknowledged_bytes >= CONNECTION_WINDOW_BYTES // 2:
            self.h2.increment_flow_control_window(self._unacknowledged_bytes)
            self._unacknowledged_bytes = 0

    # Bytes go.

    def make_ready(self, stream: Stream) -> None:
        if stream.wants_to_send:
            self._ready[stream] = None
            self.pump_soon()

    def pump_soon(self) -> None:
        """Send at the end of this turn of the event loop."""
        if not self._has_pump:
            self._has_pump = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._has_pump = False
        if self.transport.is_closing():
            return
        encoded = 0
        while self._ready and not self.is_full:
            stream = next(iter(self._ready))
            del self._ready[stream]
            sent = stream.send_some(self.h2.max_outbound_frame_size)
            if sent is None:
                continue  # until a window opens
            encoded += sent
            if stream.wants_to_send:
                self._ready[stream] = None
            else:
                self.settle(stream)
            if encoded >= CHUNK_BYTES:
                encoded = 0
                self._flush()
        self._flush()

    def _flush(self) -> None:
        data = self.h2.data_to_send()
        if data and not self.transport.is_closing():
            self.on_sent(len(data))
            self.transport.write(data)

    def on_sent(self, size: int) -> None:
        """So many bytes go to the kernel."""

    def resume_writing(self) -> None:
        super().resume_writing()
        self.pump_soon()

    # Streams end, and the connection.

    def settle(self, stream: Stream) -> None:
        """Forget a stream that is over on both sides."""
        if stream.has_sent_all and stream.was_ended:
            self._forget(stream)

    def drop(self, stream: Stream, code: ErrorCodes) -> None:
        """Reset a stream, if it is not over yet."""
        if self.streams.get(stream.number) is not stream:
            return
        self._forget(stream)
        if self.transport.is_closing() or (stream.has_sent_all and stream.was_ended):
            return
        try:
            self.h2.reset_stream(stream.number, code)
        except ProtocolError:
            return  # `h2` knows that it is over
        self.pump_soon()

    def _forget(self, stream: Stream) -> None:
        if self.streams.pop(stream.number, None) is not None:
            self._ready.pop(stream, None)
            self.on_forgotten()

    def on_forgotten(self) -> None:
        """There is one stream less."""

    def say_goaway(self, last_stream: int, code: int = 0) -> None:
        """No further streams, please, and none beyond that one were looked at."""
        self.is_going = True
        self._flush()
        if not self.transport.is_closing():
            frame = GoAwayFrame(0, last_stream_id=last_stream, error_code=code)
            self.transport.write(frame.serialize())

    def _break(self, code: int, reason: str) -> None:
        """The other side cannot be gone on with: say so, and close."""
        log.info("an HTTP/2 connection is closed: %s", reason)
        self.h2.clear_outbound_data_buffer()
        self.say_goaway(self.h2.highest_inbound_stream_id, code)
        self.transport.close()
        self.lose_streams(reason)

    def lose_streams(self, reason: str) -> None:
        """The connection is over, and so are they."""
        self.is_going = True
        self._ready.clear()
        for stream in list(self.streams.values()):
            self._forget(stream)
            stream.on_connection_lost(reason)

    def connection_lost(self, error: Exception | None) -> None:
        self.lose_streams(f"the connection broke off ({error or 'closed'})")

    def abort(self) -> None:
        """Close at once. Idempotent."""
        self.transport.abort()
