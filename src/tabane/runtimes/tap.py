"""A tap behind an instance's link, for engines that bring a network stack of their own.

A bridge in the link's network namespace joins `eth0`, the namespace's end of the wire to the node,
and a tap, which the engine opens. The guest takes over the address and the hardware address of
`eth0`, which gets another one and no address: for the node, nothing has changed. The tap belongs to
the namespace and goes with it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import threading
from pathlib import Path

from tabane.errors import EngineError, NotFound
from tabane.model import Value
from tabane.runtimes.api import Link

WIRE, BRIDGE, TAP = "eth0", "br0", "tap0"
OTHER_MAC = bytes.fromhex("027ab0020000")
"""Of the wire's end, once the guest has its own: no guest is ever given it."""

_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFADDR = 0x8913, 0x8914, 0x8916
_SIOCSIFHWADDR, _SIOCGIFHWADDR, _SIOCGIFINDEX = 0x8924, 0x8927, 0x8933
_SIOCBRADDBR, _SIOCBRADDIF = 0x89A0, 0x89A2
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_IFF_UP = 1
_ARPHRD_ETHER = 1
_PERMANENT = "0x6"
"""In /proc/net/arp: complete and permanent."""


class Tap(Value, frozen=True):
    """What the guest must be told: with these the node knows it. `name` is the device's, in the
    link's network namespace."""

    name: str
    mac: str
    gateway_mac: str


def make_tap(link: Link, owner: int) -> Tap:
    """Make the bridge and the tap, which the user `owner` (an id of the node) may open. Blocks for
    some milliseconds. Once for a link: with that all of this goes.

    Raises `EngineError` when the kernel refuses, `NotFound` when the link's namespaces are gone.
    """
    result: list[Tap] = []
    problems: list[OSError] = []

    def work() -> None:
        try:
            _enter(link.network_namespace)
            gateway_mac = find_gateway_mac(link)
            result.append(Tap(TAP, _show(_build(owner)), gateway_mac))
        except OSError as error:
            problems.append(error)

    thread = threading.Thread(target=work, name=f"tap-{link.slot}")
    thread.start()
    thread.join()
    if problems:
        if isinstance(problems[0], FileNotFoundError):
            raise NotFound(f"the network link of slot {link.slot} is gone")
        raise EngineError(f"no tap behind the link of slot {link.slot}: {problems[0]}")
    return result[0]


def find_gateway_mac(link: Link) -> str:
    """The hardware address of the node's end, from the link's permanent neighbours; empty when
    there is none, so that the guest has to ask. They go when the wire gets another address."""
    for line in Path(f"/proc/{link.parked_pid}/net/arp").read_text().splitlines()[1:]:
        address, _, flags, mac, *_ = line.split()
        if address == link.gateway and flags == _PERMANENT:
            return mac
    return ""


def _enter(path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(namespace, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
    finally:
        os.close(namespace)


def _build(owner: int) -> bytes:
    """In the link's namespace. Returns the hardware address that the guest takes over."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        mac = _mac_of(control, WIRE)
        fcntl.ioctl(control, _SIOCBRADDBR, BRIDGE.encode() + b"\0")
        _make_persistent(owner)
        fcntl.ioctl(control, _SIOCSIFADDR, _request(WIRE, struct.pack("=H14x", socket.AF_INET)))
        _set_mac(control, WIRE, OTHER_MAC)
        for name in (WIRE, TAP):
            _add_port(control, name)
            _set_up(control, name)
        _set_up(control, BRIDGE)
        return mac


def _make_persistent(owner: int) -> None:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(device, _TUNSETIFF, _request(TAP, struct.pack("=H", flags)))
        fcntl.ioctl(device, _TUNSETOWNER, owner)
        fcntl.ioctl(device, _TUNSETPERSIST, 1)
    finally:
        os.close(device)


def _index_of(control: socket.socket, name: str) -> int:
    found = fcntl.ioctl(control, _SIOCGIFINDEX, _request(name))
    return int(struct.unpack_from("=i", found, 16)[0])


def _add_port(control: socket.socket, name: str) -> None:
    request = _request(BRIDGE, struct.pack("=i", _index_of(control, name)))
    fcntl.ioctl(control, _SIOCBRADDIF, request)


def _set_up(control: socket.socket, name: str) -> None:
    found = fcntl.ioctl(control, _SIOCGIFFLAGS, _request(name))
    flags = struct.unpack_from("=h", found, 16)[0] | _IFF_UP
    fcntl.ioctl(control, _SIOCSIFFLAGS, _request(name, struct.pack("=h", flags)))


def _mac_of(control: socket.socket, name: str) -> bytes:
    found = fcntl.ioctl(control, _SIOCGIFHWADDR, _request(name))
    return bytes(found[18:24])


def _set_mac(control: socket.socket, name: str, mac: bytes) -> None:
    fcntl.ioctl(control, _SIOCSIFHWADDR, _request(name, struct.pack("=H", _ARPHRD_ETHER) + mac))


def _request(name: str, data: bytes = b"") -> bytes:
    """A `struct ifreq`."""
    return struct.pack("=16s24s", name.encode(), data)


def _show(mac: bytes) -> str:
    return mac.hex(":")
