"""Thousands of mostly quiet sockets on an epoll of their own, beside the event loop's.

A hub's work for one message to N members is N small writes and N small reads, so what counts is the
time between two system calls. Here that is a few lines: the epoll is one descriptor of the loop's;
whenever it is readable, `_on_ready` reads what has come, lets the protocols act on it, writes what
they gathered, and looks again, without a round through the loop for each.

`Transport` is the part of `asyncio.Transport` that `Wire` uses, with the same promises.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
from collections.abc import Callable
from typing import Any

from tabane.middlecon import native
from tabane.middlecon.wire import Flusher

log = logging.getLogger(__name__)

FIRST_READ_BYTES = 448
"""What Python's own allocator serves, which is quick; most of what comes is smaller."""
READ_BYTES = 64 << 10
ROUNDS = 8
"""How often `_on_ready` looks again before the loop's timers and other descriptors have a turn."""
ACCEPTS = 64
"""Connections taken from a listening socket per turn."""
FULL_PAUSE_S = 0.5
"""Before connections are taken again after the process ran out of descriptors or memory."""

_READ = select.EPOLLIN | select.EPOLLRDHUP
_WRITE = select.EPOLLOUT
_NOT_WRITE = ~_WRITE

MakeProtocol = Callable[[], asyncio.Protocol]


class Reactor:
    """Owns the sockets it is given until they are closed. `flusher` writes after each round."""

    def __init__(self, loop: asyncio.AbstractEventLoop, flusher: Flusher) -> None:
        self._loop = loop
        self._flusher = flusher
        self._epoll = select.epoll()
        self._transports: dict[int, Transport] = {}
        self._listeners: dict[int, tuple[socket.socket, MakeProtocol]] = {}
        if native.loops is not None:
            native.loops.prepare()
        loop.add_reader(self._epoll.fileno(), self._on_ready)

    def listen(self, sock: socket.socket, make_protocol: MakeProtocol) -> None:
        """Take the connections that come to a listening, non-blocking socket."""
        self._listeners[sock.fileno()] = sock, make_protocol
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def close_listener(self, sock: socket.socket) -> None:
        """Take no more connections there, and close it."""
        if self._listeners.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock.fileno())
            sock.close()

    def close_listeners(self) -> None:
        """Take no more connections; those that are there stay."""
        for fd, (sock, _) in self._listeners.items():
            self._epoll.unregister(fd)
            sock.close()
        self._listeners.clear()

    def close(self) -> None:
        """Drop whatever is left. Idempotent."""
        if self._epoll.closed:
            return
        self.close_listeners()
        for transport in list(self._transports.values()):
            transport.end(None)
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _on_ready(self) -> None:
        loops, flusher = native.loops, self._flusher
        for _ in range(ROUNDS):
            if self._epoll.closed:
                return
            flusher.begin()
            try:
                if loops is None:
                    ready = self._take_in()
                else:
                    ready = loops.take_in(self._epoll.fileno(), self._transports, self._accept)
            except Exception:
                log.exception("in what came on a connection; what else has come is taken now")
                ready = 1
            finally:
                flusher.end()
            if not ready:
                return

    def _take_in(self) -> int:
        """Act on what is ready; how many those were."""
        transports = self._transports
        events = self._epoll.poll(0, 1024)
        for fd, mask in events:
            transport = transports.get(fd)
            if transport is None:
                self._accept(fd)
                continue
            if mask & _WRITE:
                transport.on_writable()
            if mask & _NOT_WRITE:
                size = transport.read_bytes
                try:
                    data = transport.sock.recv(size)
                except BlockingIOError:
                    continue
                except OSError as error:
                    transport.end(error)
                    continue
                if len(data) == size:
                    transport.read_bytes = min(8 * size, READ_BYTES)
                if data:
                    transport.data_received(data)
                else:
                    transport.end(None)
        return len(events)

    def _accept(self, fd: int) -> None:
        listener = self._listeners.get(fd)
        if listener is None:
            return
        sock, make_protocol = listener
        for _ in range(ACCEPTS):
            try:
                connection, _ = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError as error:
                log.warning("%s; connections wait for %g s", error, FULL_PAUSE_S)
                self._epoll.modify(fd, 0)
                self._loop.call_later(FULL_PAUSE_S, self._accept_again, fd)
                return
            self._adopt(connection, make_protocol())

    def _accept_again(self, fd: int) -> None:
        if fd in self._listeners:
            self._epoll.modify(fd, select.EPOLLIN)

    def _adopt(self, sock: socket.socket, protocol: asyncio.Protocol) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport = Transport(self, self._loop, self._epoll, sock, protocol)
        self._transports[transport.fd] = transport
        self._epoll.register(transport.fd, _READ)
        protocol.connection_made(transport)

    def forget(self, transport: Transport) -> None:
        """It is being closed: nothing is read or written any more."""
        del self._transports[transport.fd]
        self._epoll.unregister(transport.fd)


def _ignore(data: bytes) -> None:
    """What still comes on a connection that is being closed."""


class Transport(asyncio.Transport):
    """One connection. Lost once, in `connection_lost`, which is called in a later turn."""

    __slots__ = (
        "_closing",
        "_epoll",
        "_high",
        "_loop",
        "_paused",
        "_protocol",
        "_reactor",
        "_rest",
        "data_received",
        "fd",
        "read_bytes",
        "sock",
    )

    data_received: Callable[[bytes], None]

    def __init__(
        self,
        reactor: Reactor,
        loop: asyncio.AbstractEventLoop,
        epoll: select.epoll,
        sock: socket.socket,
        protocol: asyncio.Protocol,
    ) -> None:
        self._reactor = reactor
        self._loop = loop
        self._epoll = epoll
        self.sock = sock
        self.data_received = protocol.data_received
        self._protocol = protocol
        self._rest: bytearray | None = None
        """What the kernel has not taken yet."""
        self._high = 64 << 10
        self._paused = False
        self._closing = False
        self.fd = sock.fileno()
        self.read_bytes = FIRST_READ_BYTES
        """Of one read; it grows when that was not enough."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._rest is not None:
            self._rest += data
            self._maybe_pause()
            return
        if self._closing:
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.end(error)
            return
        if sent < len(data):
            self._rest = bytearray(memoryview(data)[sent:])
            self._watch()
            self._maybe_pause()

    def on_writable(self) -> None:
        rest = self._rest
        if rest is None:
            return
        try:
            del rest[: self.sock.send(rest)]
        except BlockingIOError:
            return
        except OSError as error:
            self.end(error)
            return
        if rest:
            if self._paused:
                self._protocol.pause_writing()
            return
        self._rest = None
        if self._closing:
            self.end(None)
            return
        self._watch()
        if self._paused:
            self._paused = False
            self._protocol.resume_writing()

    def _watch(self) -> None:
        self._epoll.modify(self.fd, _READ if self._rest is None else _READ | _WRITE)

    def _maybe_pause(self) -> None:
        assert self._rest is not None
        if not self._paused and len(self._rest) > self._high:
            self._paused = True
            self._protocol.pause_writing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """`pause_writing` above `high` bytes; `resume_writing` when all is written."""
        if high is not None:
            self._high = high

    def get_write_buffer_size(self) -> int:
        return len(self._rest) if self._rest is not None else 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.sock if name == "socket" else default

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Once what was written has left."""
        if not self._closing:
            self._closing = True
            self.data_received = _ignore
            if self._rest is None:
                self.end(None)

    def abort(self) -> None:
        self.end(None)

    def end(self, error: OSError | None) -> None:
        """Close now. Idempotent."""
        if self.fd < 0:
            return
        self._closing = True
        self._rest = None
        self._reactor.forget(self)
        self.sock.close()
        self.fd = -1
        self._loop.call_soon(self._protocol.connection_lost, error)
