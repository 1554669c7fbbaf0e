"""The few route netlink messages that links, bridges and routes need (rtnetlink(7)).

Messages are plain bytes made by functions without IO; `Rtnetlink` sends a batch of them in one
system call and reads the kernel's answers. A socket belongs for good to the network namespace it
was opened in, so one process can configure many namespaces without entering them again.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple, Self, TypeVar

from tabane.errors import EngineError

T = TypeVar("T")

LOOPBACK_INDEX = 1

_NETLINK_ROUTE = 0
_CLONE_NEWNET = 0x40000000
_SIOCGIFINDEX = 0x8933
_RECEIVE_BYTES = 1 << 16

_NEWLINK, _DELLINK, _NEWADDR, _NEWROUTE, _NEWNEIGH = 16, 17, 20, 24, 28
_REQUEST, _ACK, _REPLACE, _EXCLUSIVE, _CREATE = 0x1, 0x4, 0x100, 0x200, 0x400
_MAKE = _CREATE | _EXCLUSIVE
_ERROR = 2

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MASTER = 1, 3, 10
_IFLA_LINKINFO, _IFLA_NET_NS_PID, _IFLA_GROUP = 18, 19, 27
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC = 1, 4, 5, 7
_NDA_DST, _NDA_LLADDR = 1, 2

_IFF_UP = 1
_MAIN_TABLE, _PROTOCOL_STATIC, _UNICAST = 254, 4, 1
_SCOPE_UNIVERSE, _SCOPE_LINK = 0, 253
_PERMANENT = 0x80

_HEADER = struct.Struct("=IHHII")
_STATUS = struct.Struct("=i")
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEIGHBOUR = struct.Struct("=BxHiHBB")


class Request(NamedTuple):
    """One message without its header, and what it does, for errors."""

    kind: int
    flags: int
    body: bytes
    what: str


def new_veth(name: str, mac: bytes, peer: str, peer_mac: bytes, peer_pid: int) -> Request:
    """A pair: `name` here and up, `peer` in the network namespace of `peer_pid` and down (the
    kernel refuses to set it up before it has the other end)."""
    other = (
        _link(0)
        + _text(_IFLA_IFNAME, peer)
        + _attribute(_IFLA_ADDRESS, peer_mac)
        + _number(_IFLA_NET_NS_PID, peer_pid)
    )
    data = _attribute(_INFO_DATA, _attribute(_VETH_PEER, other))
    body = (
        _link(0, up=True)
        + _text(_IFLA_IFNAME, name)
        + _attribute(_IFLA_ADDRESS, mac)
        + _attribute(_IFLA_LINKINFO, _text(_INFO_KIND, "veth") + data)
    )
    return Request(_NEWLINK, _MAKE, body, f"create the veth pair {name}")


def new_bridge(name: str, mac: bytes) -> Request:
    """A bridge that is up. It keeps `mac` and does not take one of its ports'."""
    info = _attribute(_IFLA_LINKINFO, _text(_INFO_KIND, "bridge"))
    body = _link(0, up=True) + _text(_IFLA_IFNAME, name) + _attribute(_IFLA_ADDRESS, mac) + info
    return Request(_NEWLINK, _MAKE, body, f"create the bridge {name}")


def set_up(index: int) -> Request:
    return Request(_NEWLINK, 0, _link(index, up=True), f"set interface {index} up")


def set_master(index: int, master: int) -> Request:
    """Make the interface a port of the bridge `master`."""
    body = _link(index) + _number(_IFLA_MASTER, master)
    return Request(_NEWLINK, 0, body, f"make interface {index} a port of {master}")


def set_group(name: str, group: int) -> Request:
    body = _link(0) + _text(_IFLA_IFNAME, name) + _number(_IFLA_GROUP, group)
    return Request(_NEWLINK, 0, body, f"put {name} into group {group}")


def delete_link(name: str) -> Request:
    return Request(_DELLINK, 0, _link(0) + _text(_IFLA_IFNAME, name), f"delete {name}")


def delete_group(group: int) -> Request:
    """Delete all interfaces of a group: the kernel then waits once, not once for each."""
    return Request(_DELLINK, 0, _link(0) + _number(_IFLA_GROUP, group), f"delete group {group}")


def add_address(index: int, address: IPv4Address, prefix: int) -> Request:
    body = _ADDRESS.pack(socket.AF_INET, prefix, 0, _SCOPE_UNIVERSE, index)
    body += _attribute(_IFA_LOCAL, address.packed) + _attribute(_IFA_ADDRESS, address.packed)
    return Request(_NEWADDR, _CREATE | _REPLACE, body, f"add address {address}/{prefix}")


def add_route(
    index: int,
    to: IPv4Network,
    *,
    via: IPv4Address | None = None,
    source: IPv4Address | None = None,
) -> Request:
    """A route in the main table, on the link itself or `via` a router, with a preferred source."""
    scope = _SCOPE_UNIVERSE if via else _SCOPE_LINK
    body = _ROUTE.pack(
        socket.AF_INET, to.prefixlen, 0, 0, _MAIN_TABLE, _PROTOCOL_STATIC, scope, _UNICAST, 0
    )
    body += _attribute(_RTA_DST, to.network_address.packed) + _number(_RTA_OIF, index)
    if via:
        body += _attribute(_RTA_GATEWAY, via.packed)
    if source:
        body += _attribute(_RTA_PREFSRC, source.packed)
    return Request(_NEWROUTE, _CREATE | _REPLACE, body, f"add the route to {to}")


def add_neighbour(index: int, address: IPv4Address, mac: bytes) -> Request:
    """A permanent entry: nobody asks by ARP where `address` is."""
    body = _NEIGHBOUR.pack(socket.AF_INET, 0, index, _PERMANENT, 0, 0)
    body += _attribute(_NDA_DST, address.packed) + _attribute(_NDA_LLADDR, mac)
    return Request(_NEWNEIGH, _CREATE | _REPLACE, body, f"add the neighbour {address}")


def encode(requests: Sequence[Request]) -> bytes:
    """The requests as one datagram, numbered from 0, each asking for an acknowledgement."""
    return b"".join(
        _HEADER.pack(
            _HEADER.size + len(request.body), request.kind, request.flags | _REQUEST | _ACK, n, 0
        )
        + request.body
        for n, request in enumerate(requests)
    )


def parse_answers(data: bytes) -> dict[int, int]:
    """The errno (0: done) for each request number that a datagram from the kernel answers."""
    answers = {}
    while len(data) >= _HEADER.size:
        length, kind, _, number, _ = _HEADER.unpack_from(data)
        if kind == _ERROR:
            answers[number] = -_STATUS.unpack_from(data, _HEADER.size)[0]
        data = data[(length + 3) & ~3 :]
    return answers


class Rtnetlink:
    """A route netlink socket of the network namespace that the calling thread is in."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE)
        self._socket.bind((0, 0))

    def perform(self, requests: Sequence[Request], *, accept: Sequence[int] = ()) -> None:
        """Do them all, in order. Raises `EngineError` for the first that failed with an errno that
        is not in `accept`; those after it were tried all the same."""
        self._socket.send(encode(requests))
        answers: dict[int, int] = {}
        while len(answers) < len(requests):
            answers |= parse_answers(self._socket.recv(_RECEIVE_BYTES))
        for number, request in enumerate(requests):
            status = answers[number]
            if status and status not in accept:
                problem = f"the kernel refused to {request.what}: {os.strerror(status)}"
                raise EngineError(problem, argv=("rtnetlink",), status=status)

    def index(self, name: str) -> int:
        """The index of an interface. Raises `EngineError` when there is none of that name."""
        try:
            found = fcntl.ioctl(self._socket, _SIOCGIFINDEX, struct.pack("16sI", name.encode(), 0))
        except OSError as error:
            problem = f"there is no interface {name}"
            raise EngineError(problem, status=error.errno or errno.ENODEV) from error
        return int(struct.unpack_from("I", found, 16)[0])

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_in_network_of(pid: int, work: Callable[[], T]) -> T:
    """Call `work` in a thread that has entered the network namespace of the process `pid`.

    Only the thread enters it, and ends with it; the caller stays where it is.
    """
    results: list[T] = []
    problems: list[BaseException] = []

    def enter_and_work() -> None:
        try:
            _enter_network(f"/proc/{pid}/ns/net")
            results.append(work())
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=enter_and_work, name=f"network-of-{pid}")
    thread.start()
    thread.join()
    if problems:
        raise problems[0]
    return results[0]


def _enter_network(path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(namespace, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
    finally:
        os.close(namespace)


def _link(index: int, *, up: bool = False) -> bytes:
    flags = _IFF_UP if up else 0
    return _LINK.pack(socket.AF_UNSPEC, 0, index, flags, flags)


def _attribute(kind: int, payload: bytes) -> bytes:
    length = 4 + len(payload)
    return struct.pack("=HH", length, kind) + payload + bytes(-length % 4)


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")
