"""A tap takes the place of a link's end, so that the node sees no difference."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from tabane.errors import EngineError, NotFound
from tabane.network.addresses import INSTANCE_MAC, NODE_MAC
from tabane.network.netlink import run_in_network_of
from tabane.runtimes.api import Link
from tabane.runtimes.tap import TAP, make_tap
from tabane.runtimes.trial import parked
from tabane.testing.machines import linked

pytestmark = pytest.mark.real

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
VNET_HEADER_BYTES = 10
ID_BASE, OWNER = 1_000_000, 1_000_007


@contextlib.contextmanager
def opened(link: Link) -> Iterator[int]:
    """The tap, as an engine opens it: by its name, in the link's network namespace."""

    def open_there() -> int:
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(device, TUNSETIFF, struct.pack("=16sH22x", TAP.encode(), flags))
        return device

    device = run_in_network_of(link.parked_pid, open_there)
    try:
        yield device
    finally:
        os.close(device)


async def take(device: int, node: socket.socket, words: bytes, to: tuple[str, int]) -> bytes:
    """Say it until it comes: a bridge passes on nothing before its ports have settled."""
    async with asyncio.timeout(60):
        while True:
            node.sendto(words, to)
            with contextlib.suppress(BlockingIOError):
                frame = os.read(device, 2000)[VNET_HEADER_BYTES:]
                if frame.endswith(words):
                    return frame
            await asyncio.sleep(0.002)


async def test_the_guest_is_at_the_links_address() -> None:
    async with linked(ID_BASE) as link:
        tap = make_tap(link, OWNER)
        assert tap.mac == INSTANCE_MAC.hex(":")
        assert tap.gateway_mac == NODE_MAC.hex(":")
        with opened(link) as device, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as node:
            node.bind((link.gateway, 0))
            frame = await take(device, node, b"hello guest", (link.address, 4000))
            assert frame[:6] == INSTANCE_MAC
            assert frame[6:12] == NODE_MAC
            assert socket.inet_ntoa(frame[30:34]) == link.address


async def test_what_a_link_lacks_is_said() -> None:
    async with parked(ID_BASE) as link:
        with pytest.raises(EngineError, match=r"no tap behind the link of slot 0: .*No such dev"):
            make_tap(link, OWNER)
    with pytest.raises(NotFound, match="slot 0 is gone"):
        make_tap(link, OWNER)
