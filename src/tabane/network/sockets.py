"""Does a network namespace listen on a port: asked of the kernel (sock_diag(7)).

One question names the address and port that a connection would go to, and the kernel looks them up
as it would for that connection. So what listens on loopback or for IPv6 only does not count, what
listens for both families does, and the answer takes some microseconds; /proc/PID/net/tcp walks
the machine's whole table of connections, a millisecond on a machine with much memory.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Self

from tabane.network.netlink import run_in_network_of

_SOCK_DIAG = 4
_BY_FAMILY, _ERROR = 20, 2
_REQUEST = 1
_ANY_STATE = 0xFFFF_FFFF
_NO_COOKIE = b"\xff" * 8
_RECEIVE_BYTES = 4096

_HEADER = struct.Struct("=IHHII")
_FILTER = struct.Struct("=BBxxI")
_PORTS_AND_ADDRESSES = struct.Struct("!HH16s16s")
_INTERFACE_AND_COOKIE = struct.Struct("=I8s")
_STATUS = struct.Struct("=i")


class SocketTable:
    """The TCP sockets of the network namespace of a process. Close it after use."""

    def __init__(self, pid: int) -> None:
        """Raises `OSError` when there is no such process."""

        def open_socket() -> socket.socket:
            return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG)

        self._sock = run_in_network_of(pid, open_socket)

    def listens(self, address: str, port: int) -> bool:
        """Whether an IPv4 connection to `address` and `port` would be taken now.

        Raises `OSError` when the kernel refuses to say.
        """
        self._sock.send(encode_question(address, port))
        return parse_answer(self._sock.recv(_RECEIVE_BYTES))

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def encode_question(address: str, port: int) -> bytes:
    """Ask for the socket that a new connection to `address` and `port` would reach."""
    body = _FILTER.pack(socket.AF_INET, socket.IPPROTO_TCP, _ANY_STATE)
    body += _PORTS_AND_ADDRESSES.pack(port, 0, socket.inet_aton(address), b"")
    body += _INTERFACE_AND_COOKIE.pack(0, _NO_COOKIE)
    return _HEADER.pack(_HEADER.size + len(body), _BY_FAMILY, _REQUEST, 1, 0) + body


def parse_answer(data: bytes) -> bool:
    """Whether the answer tells of a socket. Raises `OSError`."""
    _, kind, _, _, _ = _HEADER.unpack_from(data)
    if kind != _ERROR:
        return True
    (status,) = _STATUS.unpack_from(data, _HEADER.size)
    if status == -errno.ENOENT:
        return False
    raise OSError(-status, os.strerror(-status), "sock_diag")
