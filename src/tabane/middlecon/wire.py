"""A connection as both a hub and a client have it: bytes between a transport and a session.

What is put into the port's outbox during one turn of the loop leaves with one write at its end.
`on_frame` gets every frame but pings; `on_lost` is called once, when the connection is over.

The writing side is bounded by who fills the outbox: the port's `backlog` tells it what the kernel
has not taken yet. The reading side is not paused: acknowledgements must get through.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast
from weakref import WeakKeyDictionary

from tabane.errors import Closed, ProtocolError, SystemFault, TabaneError
from tabane.middlecon import native
from tabane.middlecon.backlog import Backlog
from tabane.middlecon.frames import HEADER, MAGIC, Frame, Kind, encode_frame
from tabane.middlecon.ports import Port
from tabane.middlecon.session import Mode, Session, encode_error

log = logging.getLogger(__name__)

LINGER_S = 1.0
"""How long a connection that is being closed may take to deliver its last frames."""
HIGH_WATER_BYTES = 64 << 10
"""Unsent bytes that are left to the transport, and so are before what is urgent. The rest waits in
the port's queue."""
QUIET_PINGED = 1
QUIET_LOST = 3
"""`check` is called three times a heartbeat: after one turn without a byte from the other side it
is pinged, after three the connection is lost. So a silence of one heartbeat (to four thirds of it)
ends it, two thirds of which are left to answer the ping."""

STUCK_LOST = 3
"""After so many checks in which the other side took nothing of the much that waits for it, the
connection is lost, however it goes on to ping."""
HOLD_BYTES = 1 << 20
"""What is much, unless told."""
ANY = 1 << 62
"""More than can be unsent."""

_PING, _PONG = int(Kind.PING), int(Kind.PONG)
_BINARY = Mode.BINARY
PING = encode_frame(Kind.PING)
PONG = encode_frame(Kind.PONG)
GOODBYE = encode_frame(Kind.GOODBYE)

PLAIN_ACK = encode_frame(Kind.ACK)[:8]
"""How an acknowledgement without an answer begins."""
ID = slice(12, 16)
"""Where its message's number is."""

OnFrame = Callable[["Wire", Frame], None]
OnLost = Callable[["Wire", TabaneError], None]


class Flusher:
    """Writes out what the ports of one loop have gathered, once per turn."""

    __slots__ = ("planned", "waiting")

    def __init__(self) -> None:
        self.waiting: list[Wire] = []
        self.planned = False

    def plan(self) -> None:
        self.planned = True
        asyncio.get_running_loop().call_soon(self._at_end_of_turn)

    def _at_end_of_turn(self) -> None:
        self.planned = False
        self.flush()

    def begin(self) -> None:
        """Whoever calls this calls `end`, too, so nothing has to be planned before."""
        self.planned = True

    def end(self) -> None:
        self.planned = False
        if self.waiting:
            self.flush()

    def flush(self) -> None:
        """Write it all now."""
        wires, self.waiting = self.waiting, []
        if native.loops is not None:
            wires = native.loops.flush(wires)
        for wire in wires:
            try:
                port = wire.port
                out, port.out = port.out, []
                if port.urgent:
                    urgent, port.urgent = port.urgent, []
                    if wire.congested:
                        wire.keep(urgent, urgent=True)
                    else:
                        out = urgent + out
                if not (out and wire.open):
                    continue
                if wire.congested:
                    wire.keep(out)
                else:
                    wire.transport.write(out[0] if len(out) == 1 else b"".join(out))
            except Exception as error:
                wire.fail(error)


_FLUSHERS: WeakKeyDictionary[asyncio.AbstractEventLoop, Flusher] = WeakKeyDictionary()


def flusher_of(loop: asyncio.AbstractEventLoop) -> Flusher:
    """That of all clients of a loop."""
    flusher = _FLUSHERS.get(loop)
    if flusher is None:
        flusher = _FLUSHERS[loop] = Flusher()
    return flusher


class Wire(asyncio.Protocol):
    """One connection. `port` is its outbox; who opens the session may put a better one there."""

    __slots__ = (
        "_closed",
        "_decoder",
        "_flusher",
        "_gone",
        "_greeted",
        "_hold_bytes",
        "_linger",
        "_on_made",
        "_on_text",
        "_queue_bytes",
        "_quiet",
        "_stuck",
        "_unsent",
        "congested",
        "on_ack",
        "on_drained",
        "on_frame",
        "on_lost",
        "open",
        "port",
        "session",
        "transport",
    )
    transport: asyncio.Transport

    def __init__(
        self,
        session: Session,
        flusher: Flusher,
        on_frame: OnFrame,
        on_lost: OnLost,
        *,
        queue_bytes: int,
        hold_bytes: int = HOLD_BYTES,
        on_made: Callable[[Wire], None] | None = None,
        on_text: Callable[[Wire], None] | None = None,
    ) -> None:
        self.session = session
        self._decoder = session.decoder
        self.open = False
        self.port = Port("", self.wake)
        self._flusher = flusher
        self.on_frame = on_frame
        self.on_lost = on_lost
        self.on_ack: Callable[[Port, int], None] | None = None
        """Takes an acknowledgement that is all that came: most of what a hub reads."""
        self.on_drained: Callable[[Port], None] | None = None
        """Called when all that waited for the kernel has been written."""
        self._on_made = on_made
        self._on_text = on_text
        self._queue_bytes = queue_bytes
        self._greeted = False
        self.congested = False
        self._quiet = 0
        self._hold_bytes = hold_bytes
        self._stuck = 0
        """Checks in a row in which nothing of the much that waits was taken."""
        self._unsent = ANY
        """What the transport had not written at the last check."""
        self._gone: asyncio.Event | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._closed = False

    def wake(self) -> None:
        """The port's outbox has something: flush it at the end of this turn."""
        flusher = self._flusher
        flusher.waiting.append(self)
        if not flusher.planned:
            flusher.plan()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.open = True
        self.transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        if self._on_made is not None:
            self._on_made(self)

    def data_received(self, data: bytes) -> None:
        self._quiet = 0
        if (
            len(data) == HEADER.size
            and self.on_ack is not None
            and data.startswith(PLAIN_ACK)
            and not self._decoder.rest
        ):
            try:
                self.on_ack(self.port, int.from_bytes(data[ID]))
            except ProtocolError as error:
                self.cut(error)
            except Exception as error:
                self.fail(error)
            return
        try:
            for frame in self.session.receive(data):
                if not self.open:
                    return
                if frame.kind == _PING:
                    self.port.send_first(PONG)
                elif frame.kind != _PONG:
                    self.on_frame(self, frame)
            self._look_at_mode()
        except ProtocolError as error:
            self.cut(error)
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """What is received or sent met a fault of this side: it costs this connection, no other."""
        log.error("the session of %s is cut off", self.port.name or "nobody yet", exc_info=error)
        fault = SystemFault(f"{type(error).__name__} in what handled this session: see the log")
        try:
            self.cut(fault)
        except Exception:
            log.exception("it cannot be told why")
            self.lose(fault)

    def _look_at_mode(self) -> None:
        mode = self.session.mode
        if self._decoder.broken is not None:
            self.cut(self._decoder.broken)
        elif mode is not _BINARY and mode is not None:
            if mode is Mode.HTTP or self._on_text is None:
                self.refuse_text()
            else:
                self._on_text(self)

    def keep(self, frames: list[bytes], *, urgent: bool = False) -> None:
        """Queue what the kernel does not take now."""
        port = self.port
        queue = port.queue = port.queue or Backlog()
        for frame in frames:
            if urgent:
                queue.put_urgent(frame)
            else:
                queue.put(frame)
        port.backlog = queue.bytes + self.transport.get_write_buffer_size()
        if port.backlog - port.allowed > 2 * self._queue_bytes:
            self.lose(Closed(f"{port.name} does not read: {port.backlog} bytes wait for it"))

    def pause_writing(self) -> None:
        self.congested = True
        waiting = self.port.queue.bytes if self.port.queue is not None else 0
        self.port.backlog = waiting + self.transport.get_write_buffer_size()

    def resume_writing(self) -> None:
        self.congested = False
        self._unsent = ANY
        port = self.port
        while port.queue is not None and not self.congested:
            self.transport.write(port.queue.take(HIGH_WATER_BYTES))
            if not port.queue.bytes:
                port.queue = None
        if self.congested:
            self.pause_writing()
            return
        port.backlog = port.allowed = 0
        if self.on_drained is not None:
            self.on_drained(port)

    def check(self) -> None:
        """A third of a heartbeat has passed: ping a quiet peer, lose one that is silent, or does
        not read."""
        self._quiet += 1
        if self._is_stuck():
            port = self.port
            self.lose(Closed(f"{port.name} does not read: {port.backlog} bytes wait for it"))
            return
        if self._quiet > QUIET_LOST:
            self.lose(Closed(f"{self.port.name or 'the other side'} has been silent too long"))
        elif self._quiet > QUIET_PINGED:
            self.port.send_first(PING)

    def forgive(self) -> None:
        """Forget how long the other side has been silent, and has read nothing."""
        self._quiet = self._stuck = 0
        self._unsent = ANY

    def _is_stuck(self) -> bool:
        """Whether much waits, and for three checks the kernel took nothing of it. What the
        transport has only gets less while the rest waits in the queue."""
        if not self.congested:
            self.port.allowed = self._stuck = 0
            return False
        before, self._unsent = self._unsent, self.transport.get_write_buffer_size()
        if self._unsent < before:
            self._quiet = self._stuck = 0  # it reads, and our ping waits behind what it reads
        elif self.port.backlog <= self._hold_bytes:
            self._stuck = 0
        else:
            self._stuck += 1
        return self._stuck >= STUCK_LOST

    def refuse_text(self) -> None:
        """Whoever is there speaks HTTP, or text where there is no chat."""
        if self.session.mode is Mode.HTTP:
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
        self.transport.write(b"This is a middlecon hub; it speaks its binary protocol only.\n")
        self.lose(ProtocolError("the other side speaks text"), linger=True)

    def cut(self, error: TabaneError) -> None:
        """Tell the other side what it did wrong, and close."""
        self.greet(encode_error(error))
        self.lose(error, linger=True)

    def begin(self, hello: bytes) -> None:
        """Say hello, on a connection that this side made."""
        self._greeted = True
        self.port.send(hello)

    def greet(self, frame: bytes) -> None:
        """Send a frame, after the magic if this side has not sent it yet."""
        if not self._greeted:
            self._greeted = True
            self.port.send(MAGIC)
        self.port.send(frame)

    def close(self) -> None:
        """Say goodbye and close, once what is in the outbox has been delivered."""
        if self.open:
            if self._greeted:
                self.port.send(GOODBYE)
            self.lose(Closed("this side closed the session"), linger=True)

    def lose(self, error: TabaneError, *, linger: bool = False) -> None:
        """End the connection for the reason `error`: at once, or after its last frames."""
        if not self.open:
            return
        if not linger:
            self.transport.abort()
        else:
            self._write_rest()
            if self.transport.get_write_buffer_size():
                loop = asyncio.get_running_loop()
                self._linger = loop.call_later(LINGER_S, self.transport.abort)
            self.transport.close()
        self._end(error)

    def _write_rest(self) -> None:
        port = self.port
        rest = [port.queue.take(port.queue.bytes)] if port.queue is not None else []
        rest += port.urgent + port.out
        port.out, port.urgent, port.queue = [], [], None
        if rest:
            self.transport.write(b"".join(rest))

    async def wait_closed(self) -> None:
        """Until the transport is closed: what was sent before has left, or could not."""
        if not self._closed:
            self._gone = self._gone or asyncio.Event()
            await self._gone.wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        if self._linger is not None:
            self._linger.cancel()
        if self._gone is not None:
            self._gone.set()
        self._end(Closed(str(exc) if exc else "the other side closed the session"))

    def _end(self, error: TabaneError) -> None:
        if self.open:
            self.open = False
            try:
                self.on_lost(self, error)
            except Exception:
                log.exception("the end of the session of %s", self.port.name or "nobody yet")
