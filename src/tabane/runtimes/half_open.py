"""Does an address listen on a port, where no socket table says so: asked by half a handshake.

What has a network stack of its own (a sandbox, a virtual machine) is sent one raw SYN. A SYN-ACK
says that somebody listens there, an RST that nobody does yet, silence that the stack is not up.
This machine's kernel, which knows of no such connection, answers the SYN-ACK with an RST by itself,
so that the other stack forgets it: no program sees a connection, since none was ever complete. The
source ports are those below 1024, which no ordinary connection from here has.

Segments are plain bytes made and read by functions without IO (RFC 9293, 3.1).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import struct
from contextlib import suppress
from typing import NamedTuple

from tabane.errors import Unreachable

FIRST_POLL_S = 0.001
LAST_POLL_S = 0.05
GROWTH = 1.02
SOURCE_PORTS = range(512, 1024)
SYN, RST, ACK = 0x02, 0x04, 0x10
WINDOW_BYTES = 1024
RECEIVE_BYTES = 2048

_SEGMENT = struct.Struct("!HHIIBBHHH")
_PSEUDO = struct.Struct("!4s4sBBH")


class Segment(NamedTuple):
    """What matters here of a TCP header."""

    source: int
    target: int
    sequence: int
    acknowledged: int
    flags: int


async def wait_listening(address: str, port: int) -> None:
    """Return when a connection to `port` at `address` would be taken; never by itself.

    Needs CAP_NET_RAW. Raises `Unreachable` when there is no way to the address.
    """
    asker = _Asker(address, port)
    try:
        await asker.listens
    finally:
        asker.close()


class _Asker:
    """Sends SYNs to one address and port, and hears the answers to them: callbacks only, since it
    takes its time from the very start that it waits for."""

    def __init__(self, address: str, port: int) -> None:
        self._port = port
        self._sequence = int.from_bytes(os.urandom(4), "big")
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
        try:
            self._sock.setblocking(False)
            self._sock.connect((address, 0))
        except OSError as error:
            self._sock.close()
            raise Unreachable(f"there is no way to {address}: {error.strerror}") from error
        self._ends = (self._sock.getsockname()[0], address)
        self._sources = itertools.cycle(SOURCE_PORTS)
        self._pause_s = FIRST_POLL_S
        self._loop = asyncio.get_running_loop()
        self.listens: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._sock, self._hear)
        self._timer = self._loop.call_soon(self._ask)

    def _ask(self) -> None:
        """Send one, and again after a while; what the kernel cannot send now is as good as lost."""
        segment = Segment(next(self._sources), self._port, self._sequence, 0, SYN)
        with suppress(OSError):
            self._sock.send(encode_segment(segment, *self._ends))
        self._timer = self._loop.call_later(self._pause_s, self._ask)
        self._pause_s = min(self._pause_s * GROWTH, LAST_POLL_S)

    def _hear(self) -> None:
        """Take a packet, or the error that was reported for one of ours."""
        with suppress(OSError):
            segment = parse_packet(self._sock.recv(RECEIVE_BYTES))
            if segment is not None and self._is_yes(segment) and not self.listens.done():
                self.listens.set_result(None)

    def _is_yes(self, segment: Segment) -> bool:
        expected = (self._sequence + 1) & 0xFFFF_FFFF
        return (
            segment.flags & (SYN | ACK | RST) == SYN | ACK
            and segment.source == self._port
            and segment.target in SOURCE_PORTS
            and segment.acknowledged == expected
        )

    def close(self) -> None:
        self._timer.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()


def encode_segment(segment: Segment, source: str, target: str) -> bytes:
    """A header without options or data, from one IPv4 address to another."""

    def pack(checksum: int) -> bytes:
        *numbers, flags = segment
        words = _SEGMENT.size // 4 << 4
        return _SEGMENT.pack(*numbers, words, flags, WINDOW_BYTES, checksum, 0)

    ends = socket.inet_aton(source), socket.inet_aton(target)
    pseudo = _PSEUDO.pack(*ends, 0, socket.IPPROTO_TCP, _SEGMENT.size)
    return pack(checksum_of(pseudo + pack(0)))


def checksum_of(data: bytes) -> int:
    """The internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def parse_packet(data: bytes) -> Segment | None:
    """The segment in an IPv4 packet; None when it has none that is whole."""
    if not data or data[0] >> 4 != 4:
        return None
    header_bytes = (data[0] & 0x0F) * 4
    if header_bytes < 20 or len(data) < header_bytes + _SEGMENT.size:
        return None
    if data[9] != socket.IPPROTO_TCP:
        return None
    source, target, sequence, acknowledged, _, flags, *_ = _SEGMENT.unpack_from(data, header_bytes)
    return Segment(source, target, sequence, acknowledged, flags)
