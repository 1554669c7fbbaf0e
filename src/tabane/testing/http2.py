"""HTTP/2 by hand: one end of a connection, which sends and sees every frame."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from h2.config import H2Configuration
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    InformationalResponseReceived,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes
from hyperframe.frame import Frame

from tabane.gateway.http2 import GoingProtocol
from tabane.testing.http import PATIENCE_S, Wire

Fields = list[tuple[bytes, bytes]]
Found = TypeVar("Found", bound=Event)


@dataclass
class Exchanged:
    """What came of one stream."""

    fields: Fields = field(default_factory=list)
    interims: list[Fields] = field(default_factory=list)
    body: bytes = b""
    trailers: Fields = field(default_factory=list)
    ended: bool = False
    reset: int | None = None
    """With this error code."""

    def get(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.fields if key == name), None)

    @property
    def status(self) -> int:
        return int(self.get(b":status") or b"0")


class Http2Wire:
    """`acknowledges`: it opens the windows for what came."""

    def __init__(self, wire: Wire, *, is_client: bool, acknowledges: bool = True) -> None:
        self.wire = wire
        self.acknowledges = acknowledges
        config = H2Configuration(
            client_side=is_client,
            header_encoding=None,
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
        self.h2 = GoingProtocol(config)
        self.h2.initiate_connection()
        self.streams: dict[int, Exchanged] = {}
        self.goaways: list[tuple[int, int]] = []
        """Of each: the last stream, the error code."""
        self.events: list[Event] = []
        self.is_closed = False
        self.obeys = True
        """It opens no more streams at once than it may."""

    async def flush(self) -> None:
        await self.wire.send(self.h2.data_to_send())

    async def send_frame(self, frame: Frame) -> None:
        """One that `h2` would not send."""
        await self.wire.send(self.h2.data_to_send(), frame.serialize())

    # What a client does.

    async def ask(
        self, *fields: tuple[bytes, bytes], body: bytes | None = None, end: bool = True
    ) -> int:
        """Begin a request for a.test (or what the fields say otherwise): the stream's number."""
        number = self.h2.get_next_available_stream_id()
        if not self.obeys:
            self.h2.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS] = 1 << 30
            self.h2.remote_settings.acknowledge()
        pseudo = {b":method": b"GET", b":scheme": b"http", b":authority": b"a.test", b":path": b"/"}
        pseudo |= {name: value for name, value in fields if name[:1] == b":"}
        regular = [one for one in fields if one[0][:1] != b":"]
        self.streams[number] = Exchanged()
        no_more = end and body is None
        self.h2.send_headers(number, [*pseudo.items(), *regular], end_stream=no_more)
        await self.flush()
        if body is not None:
            await self.send_body(number, body, end=end)
        return number

    async def send_body(self, number: int, body: bytes, *, end: bool) -> None:
        """As fast as the windows allow."""
        rest = memoryview(body)
        while rest or end:
            size = min(
                self.h2.local_flow_control_window(number),
                self.h2.max_outbound_frame_size,
                len(rest),
            )
            if rest and not size:
                await self.receive()
                continue
            is_last = end and size == len(rest)
            self.h2.send_data(number, bytes(rest[:size]), end_stream=is_last)
            rest = rest[size:]
            await self.flush()
            if is_last:
                return

    async def answer_of(self, number: int) -> Exchanged:
        """Wait until a stream is over."""
        stream = self.streams[number]
        while not stream.ended and stream.reset is None:
            await self.receive()
        return stream

    async def exchange(self, *fields: tuple[bytes, bytes], body: bytes | None = None) -> Exchanged:
        return await self.answer_of(await self.ask(*fields, body=body))

    # What a server does.

    async def accept(self) -> int:
        """The next request's stream; its fields and body are in `streams`."""
        event = await self.wait(RequestReceived)
        return event.stream_id

    async def answer(
        self,
        number: int,
        *fields: tuple[bytes, bytes],
        body: bytes = b"",
        trailers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        self.h2.send_headers(number, [(b":status", b"200"), *fields])
        await self.flush()
        await self.send_body(number, body, end=not trailers)
        if trailers:
            self.h2.send_headers(number, trailers, end_stream=True)
            await self.flush()

    # What came.

    async def wait(self, kind: type[Found]) -> Found:
        """The next event of a kind; others before it have been taken in."""
        while True:
            for event in self.events:
                if isinstance(event, kind):
                    self.events.remove(event)
                    return event
            await self.receive()

    async def receive(self) -> None:
        """Take in what comes next. Raises `EOFError` at the end of the connection."""
        await self.flush()
        async with asyncio.timeout(PATIENCE_S):
            data = await self.wire.reader.read(1 << 16)
        if not data:
            self.is_closed = True
            raise EOFError("the connection is closed")
        for event in self.h2.receive_data(data):
            self._take_in(event)
            self.events.append(event)
        await self.flush()

    async def until_closed(self) -> None:
        while not self.is_closed:
            try:
                await self.receive()
            except (EOFError, ConnectionError):
                self.is_closed = True

    def _take_in(self, event: Event) -> None:
        if isinstance(event, ConnectionTerminated):
            self.goaways.append((event.last_stream_id or 0, int(event.error_code or 0)))
            return
        stream = self.streams.setdefault(getattr(event, "stream_id", 0) or 0, Exchanged())
        if isinstance(event, RequestReceived | ResponseReceived):
            stream.fields = list(event.headers)
        elif isinstance(event, InformationalResponseReceived):
            stream.interims.append(list(event.headers))
        elif isinstance(event, TrailersReceived):
            stream.trailers = list(event.headers)
        elif isinstance(event, StreamEnded):
            stream.ended = True
        elif isinstance(event, StreamReset):
            stream.reset = int(event.error_code or 0)
        elif isinstance(event, DataReceived):
            stream.body += event.data or b""
            if self.acknowledges:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
