"""Where a hub is: `tcp://HOST:PORT` and `unix:///PATH`, for those who dial and those who listen."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple

from tabane.errors import Conflict, UsageError
from tabane.unix import connect_unix, shortened

BACKLOG = 4096
"""As large as the kernel's default limit (net.core.somaxconn): after a restart all come at once."""


class Tcp(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Unix(NamedTuple):
    path: Path

    def __str__(self) -> str:
        return str(self.path)


Address = Tcp | Unix


def parse_url(url: str) -> Address:
    """Raises `UsageError`."""
    scheme, _, rest = url.partition("://")
    if scheme == "unix" and rest.startswith("/"):
        return Unix(Path(rest))
    if scheme == "tcp":
        return parse_host_port(rest)
    raise UsageError(f"{url!r} is no hub's address: write tcp://HOST:PORT or unix:///PATH")


def parse_host_port(text: str) -> Tcp:
    """`HOST:PORT`, with an IPv6 host in brackets. Raises `UsageError`."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{text!r} is no address: write HOST:PORT, as 127.0.0.1:8080")
    return Tcp(host.removeprefix("[").removesuffix("]"), int(port))


def describe(where: Any) -> str:
    """A socket's address (`getsockname`) as people write it: `HOST:PORT`, or a unix socket's path.
    IPv4 is IPv4 on whichever socket it came."""
    if isinstance(where, (str, bytes)):
        return os.fsdecode(where)
    host, port = where[:2]
    return str(Tcp(host.removeprefix("::ffff:") if "." in host else host, port))


def is_loopback(sock: socket.socket) -> bool:
    return ipaddress.ip_address(sock.getsockname()[0]).is_loopback


def listen_on(address: Address) -> socket.socket:
    """A listening socket. A unix socket that a dead process left behind is replaced.

    Raises `Conflict` when the address is taken, `UsageError` when it cannot be had.
    """
    try:
        return _listen_unix(address.path) if isinstance(address, Unix) else _listen_tcp(address)
    except OSError as error:
        if isinstance(error, (FileExistsError, BlockingIOError)) or error.errno == 98:
            raise Conflict(f"{address} is taken: another process listens there") from None
        raise UsageError(f"cannot listen on {address}: {error.strerror or error}") from None


def _listen_tcp(address: Tcp) -> socket.socket:
    family, kind, proto, _, where = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _listen_unix(path: Path) -> socket.socket:
    if path.is_socket():
        _remove_dead(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with shortened(path) as short:
            sock.bind(short)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_dead(path: Path) -> None:
    try:
        connect_unix(path).close()
    except ConnectionRefusedError:
        path.unlink()
    else:
        raise FileExistsError
