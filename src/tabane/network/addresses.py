"""Who has which address: the instance network of a node and the subnet of a local cluster.

Instances of every node live in 100.64.0.0/18 (shared address space, RFC 6598), which is never seen
outside the node. An instance has a *slot*, and address and interface name follow from its number.
The lower half of the slots may not open connections to the outside, the upper half may, so the
packet filter's rules name two networks and never change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network

from tabane.errors import Busy, Unavailable

INSTANCES = IPv4Network("100.64.0.0/18")
DENIED, EGRESS = INSTANCES.subnets()
GATEWAY = IPv4Address("100.64.0.1")
"""The node's own address in the instance network: every instance's router, resolver and proxy."""
LINK_PREFIX = "inst"
"""The node's ends of all links are named with it; the packet filter matches `inst*`."""
NODE_MAC, INSTANCE_MAC = bytes.fromhex("027ab0000001"), bytes.fromhex("027ab0010001")
"""Of the two ends of every link: each is a wire for itself, so they can all be the same. What is
saved with one link and goes on with another (a machine) has the right one already."""

_PRIVATE = IPv4Network("10.0.0.0/8")
_SUBNETS = 1 << 16
_RESERVED = 2
"""Slots left free at both ends of a half: its network and broadcast address, and the gateway."""


def address_of(slot: int) -> IPv4Address:
    return INSTANCES[slot]


def link_name(slot: int) -> str:
    """The node's end of the link with this slot."""
    return f"{LINK_PREFIX}{slot}"


def slot_of_link(name: str) -> int | None:
    """The slot of an interface, or None when it is not one of ours."""
    number = name.removeprefix(LINK_PREFIX)
    return int(number) if number != name and number.isdecimal() else None


def has_egress(address: str) -> bool:
    """Whether an instance with this address may open connections to the outside."""
    return IPv4Address(address) in EGRESS


class Slots:
    """Hands out the slots of both halves: fresh ones first, then the one free for the longest."""

    def __init__(self) -> None:
        self._free = {
            egress: deque(_slots(EGRESS if egress else DENIED)) for egress in (True, False)
        }
        self._taken: set[int] = set()

    def take(self, egress: bool) -> int:
        """A free slot. Raises `Busy` when all are taken."""
        free = self._free[egress]
        while free:
            slot = free.popleft()
            if slot not in self._taken:
                self._taken.add(slot)
                return slot
        kind = "with" if egress else "without"
        raise Busy(f"all addresses for instances {kind} egress are in use: stop some or lower max")

    def reserve(self, slot: int) -> None:
        """Mark a slot that is in use already. It is given back like any other."""
        self._taken.add(slot)

    def give_back(self, slot: int) -> None:
        """Make the slot free for others. Slots that are free already stay as they are."""
        if slot in self._taken:
            self._taken.remove(slot)
            self._free[address_of(slot) in EGRESS].append(slot)


def _slots(half: IPv4Network) -> range:
    first = int(half.network_address) - int(INSTANCES.network_address)
    return range(first + _RESERVED, first + half.num_addresses - 1)


def choose_subnet(taken: Iterable[IPv4Network], *, start: int = 0) -> IPv4Network:
    """The first free 10.x.y.0/24 at or after the `start`th, going round. Raises `Unavailable`."""
    used = bytearray(_SUBNETS)
    for network in taken:
        if network.overlaps(_PRIVATE):
            first, last = (
                int(edge) - int(_PRIVATE.network_address) >> 8
                for edge in (max(network[0], _PRIVATE[0]), min(network[-1], _PRIVATE[-1]))
            )
            used[first : last + 1] = b"\1" * (last + 1 - first)
    number = used.find(0, start % _SUBNETS)
    if number < 0:
        number = used.find(0)
    if number < 0:
        raise Unavailable("no 10.x.y.0/24 is free on this machine: its routes use them all")
    return IPv4Network((_PRIVATE[number << 8], 24))
