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
import os
import socket
import struct
from ipaddress import IPv4Address
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
    loop, pause_s = asyncio.get_running_loop(), FIRST_POLL_S
    with _Asker(address, port) as asker:
        while True:
            asker.ask()
            ends = loop.time() + pause_s
            while (answer := await asker.answer(ends)) is not None:
                if answer.flags & (SYN | ACK | RST) == SYN | ACK:
                    return
            pause_s = min(pause_s * GROWTH, LAST_POLL_S)


class _Asker:
    """Sends SYNs to one address and port, and hears the answers to them."""

    def __init__(self, address: str, port: int) -> None:
        self._port = port
        self._sequence = int.from_bytes(os.urandom(4), "big")
        self._number = 0
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
        try:
            self._sock.setblocking(False)
            self._sock.connect((address, 0))
        except OSError as error:
            self._sock.close()
            raise Unreachable(f"there is no way to {address}: {error.strerror}") from error
        self._ends = (self._sock.getsockname()[0], address)

    def ask(self) -> None:
        """Send one; what the kernel cannot send now is as good as lost on the way."""
        source = SOURCE_PORTS[self._number % len(SOURCE_PORTS)]
        self._number += 1
        segment = Segment(source, self._port, self._sequence, 0, SYN)
        try:
            self._sock.send(encode_segment(segment, *self._ends))
        except OSError:
            pass

    async def answer(self, until: float) -> Segment | None:
        """The next answer to one of them; None when it does not come until that time."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(until):
                while True:
                    segment = parse_packet(await self._receive(loop))
                    if segment is not None and self._is_answer(segment):
                        return segment
        except TimeoutError:
            return None

    async def _receive(self, loop: asyncio.AbstractEventLoop) -> bytes:
        """A packet; empty for an error that was reported for one of ours."""
        try:
            return await loop.sock_recv(self._sock, RECEIVE_BYTES)
        except OSError:
            return b""

    def _is_answer(self, segment: Segment) -> bool:
        expected = (self._sequence + 1) & 0xFFFF_FFFF
        return (
            segment.source == self._port
            and segment.target in SOURCE_PORTS
            and bool(segment.flags & ACK)
            and segment.acknowledged == expected
        )

    def __enter__(self) -> _Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()


def encode_segment(segment: Segment, source: str, target: str) -> bytes:
    """A header without options or data, from one IPv4 address to another."""

    def pack(checksum: int) -> bytes:
        *numbers, flags = segment
        words = _SEGMENT.size // 4 << 4
        return _SEGMENT.pack(*numbers, words, flags, WINDOW_BYTES, checksum, 0)

    ends = IPv4Address(source).packed, IPv4Address(target).packed
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
