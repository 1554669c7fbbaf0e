"""Back-pressure, the same for every connection here: when to stop reading, who is too slow."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import socket
import struct
import sys
import termios
from typing import cast

_NEWS = select.POLLIN | select.POLLRDHUP
_BROKEN = select.POLLERR | select.POLLHUP
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)


class Flow(asyncio.Protocol):
    """A connection whose `is_full` says that the other side takes no more bytes for now."""

    __slots__ = ("_waiting_bytes", "is_dead", "is_full", "reads", "transport")

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.is_full = False
        self.is_dead = False
        """The other side has ended: the end of what it sent is no end in good order."""
        self.reads = True
        self._waiting_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def read(self, on: bool) -> None:
        """Read from the connection, or leave what comes to the kernel. Idempotent."""
        if on is self.reads or self.transport.is_closing():
            return
        self.reads = on
        if on:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()

    def break_off(self) -> None:
        """The other side ended with its network stack, so neither FIN nor RST will come: read what
        it sent, then take the connection as reset. Idempotent."""
        self.is_dead = True
        if self.transport.is_closing():
            return
        with socket.socket(fileno=os.dup(self._fileno())) as same:
            try:
                same.shutdown(socket.SHUT_RD)
            except OSError as error:
                if error.errno != errno.ENOTCONN:  # then it is reset already
                    raise

    def cut(self) -> None:
        """Close at once with a reset: the other side must not take it for an end in good order.
        Idempotent."""
        if not self.transport.is_closing():
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
        self.transport.abort()

    def pause_writing(self) -> None:
        self.is_full = True
        self._waiting_bytes = self._count_waiting()
        self.on_flow()

    def resume_writing(self) -> None:
        self.is_full = False
        self.on_flow()

    def on_flow(self) -> None:
        """`is_full` changed."""

    def has_moved(self) -> bool:
        """The other side has taken bytes since it became full, or since the last call."""
        before, self._waiting_bytes = self._waiting_bytes, self._count_waiting()
        return self._waiting_bytes < before

    def _count_waiting(self) -> int:
        """Bytes that the other side has not taken yet: those in the kernel too, or a slow reader
        would seem to stand still until a third of the kernel's buffer is free."""
        unsent = fcntl.ioctl(self._fileno(), termios.TIOCOUTQ, bytes(4))
        return self.transport.get_write_buffer_size() + int.from_bytes(unsent, sys.byteorder)

    def has_news(self) -> bool:
        """The kernel has bytes, or an end, that the loop has not told yet."""
        return self._poll(_NEWS)

    def peer_has_left(self) -> bool:
        """The other side has closed, as the kernel knows even while nobody reads."""
        return self._poll(select.POLLRDHUP)

    def has_broken(self) -> bool:
        """The connection was reset, as the kernel knows even while nobody reads."""
        return self._poll(_BROKEN)

    def count_unread(self) -> int:
        """Bytes that came and that nobody has read."""
        return int.from_bytes(
            fcntl.ioctl(self._fileno(), termios.FIONREAD, bytes(4)), sys.byteorder
        )

    def _poll(self, events: int) -> bool:
        poll = select.poll()
        poll.register(self._fileno(), events)
        return any(happened & (events | _BROKEN) for _, happened in poll.poll(0))

    def _fileno(self) -> int:
        return cast(int, self.transport.get_extra_info("socket").fileno())
