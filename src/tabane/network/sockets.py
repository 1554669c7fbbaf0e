"""Which TCP ports a network namespace listens on, asked of the kernel (sock_diag(7)).

The same is in /proc/PID/net/tcp, but reading that walks the machine's whole table of connections:
a millisecond on a machine with much memory, where asking for listening sockets alone takes 40 us.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple, Self

from tabane.network.netlink import run_in_network_of

_SOCK_DIAG = 4
_BY_FAMILY = 20
_REQUEST_DUMP = 0x301
_DONE, _ERROR = 3, 2
_LISTEN = 1 << 10
_RECEIVE_BYTES = 1 << 16

_HEADER = struct.Struct("=IHHII")
_QUESTION = struct.Struct("=BBBxI48x")
_SOCKET = struct.Struct("!4xHxx16s")
"""The beginning of inet_diag_msg: source port and address."""

_MAPPED = b"\0" * 10 + b"\xff\xff"
_LOOPBACK6 = b"\0" * 15 + b"\1"


class Listener(NamedTuple):
    port: int
    address: bytes
    """4 or 16 bytes, in network order."""

    @property
    def is_loopback(self) -> bool:
        """Nobody outside of its namespace can connect to it."""
        if len(self.address) == 4 or self.address.startswith(_MAPPED):
            return self.address[-4] == 127
        return self.address == _LOOPBACK6


class ListeningSockets:
    """The listening sockets of the network namespace of a process. Close it after use."""

    def __init__(self, pid: int) -> None:
        def open_socket() -> socket.socket:
            return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG)

        self._sock = run_in_network_of(pid, open_socket)

    def read(self) -> list[Listener]:
        """All that listen now, IPv4 and IPv6."""
        found: list[Listener] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            self._sock.send(encode_question(family))
            ended = False
            while not ended:
                listeners, ended = parse_answer(self._sock.recv(_RECEIVE_BYTES), family)
                found += listeners
        return found

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def encode_question(family: int) -> bytes:
    """Ask for all listening TCP sockets of a family."""
    size = _HEADER.size + _QUESTION.size
    header = _HEADER.pack(size, _BY_FAMILY, _REQUEST_DUMP, 1, 0)
    return header + _QUESTION.pack(family, socket.IPPROTO_TCP, 0, _LISTEN)


def parse_answer(data: bytes, family: int) -> tuple[list[Listener], bool]:
    """Listeners in one packet of the answer, and whether it was the last. Raises `OSError`."""
    size = 4 if family == socket.AF_INET else 16
    found: list[Listener] = []
    for kind, payload in _messages(data):
        if kind == _DONE:
            return found, True
        if kind == _ERROR:
            number = -int.from_bytes(payload[:4], "little", signed=True)
            raise OSError(number, os.strerror(number), "sock_diag")
        port, address = _SOCKET.unpack_from(payload)
        found.append(Listener(port, address[:size]))
    return found, False


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _HEADER.size <= len(data):
        size, kind, _, _, _ = _HEADER.unpack_from(data, offset)
        yield kind, data[offset + _HEADER.size : offset + size]
        offset += (size + 3) & ~3
