"""The machine's side of a local cluster: a bridge for its nodes, and their way out.

Each local cluster has a bridge with a subnet of its own, chosen so that it overlaps nothing the
machine has a route to; the machine is its first address. Forwarding is switched on for the two
interfaces that need it only. Several clusters may share the interface to the outside, so what it
was before is kept in a file, and the last cluster to leave restores it.

All functions block for some milliseconds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import IO

from tabane.errors import UsageError
from tabane.model import Value
from tabane.network import netlink
from tabane.network.addresses import choose_subnet
from tabane.network.netlink import Rtnetlink, run_in_network_of
from tabane.network.rules import apply_rules, host_rules, remove_rules

UPLINK = "uplink"
"""The node's only interface to its peers and the outside."""

_BRIDGES, _PORTS = "tbn", "tbp"
_RUN = Path("/run/tabane")
_CONF = Path("/proc/sys/net/ipv4/conf")
_EVERYWHERE = IPv4Network("0.0.0.0/0")
_SHORTEST_PREFIX = 8
"""Routes to more than that lead out; they do not say that the addresses are taken."""


class ClusterNetwork(Value, frozen=True):
    """All there is to remember of a cluster's network."""

    cluster: str
    """1 to 8 letters and digits: interface names have 15 characters at most."""
    subnet: str

    @property
    def bridge(self) -> str:
        return f"{_BRIDGES}{self.cluster}"

    @property
    def table(self) -> str:
        return f"tabane_{self.cluster}"

    @property
    def network(self) -> IPv4Network:
        return IPv4Network(self.subnet)

    @property
    def host_address(self) -> IPv4Address:
        """The machine's address, and the nodes' way out."""
        return self.network[1]

    def node_address(self, number: int) -> IPv4Address:
        """The address of a node; numbers are 1 to 253."""
        return self.network[number + 1]

    def port(self, number: int) -> str:
        """The machine's end of a node's uplink."""
        return f"{_PORTS}{self.cluster}-{number}"


def set_up_network(cluster: str) -> ClusterNetwork:
    """Make the bridge, the rules and the way out. What a crash left of it is replaced."""
    if not re.fullmatch("[a-z0-9]{1,8}", cluster):
        raise UsageError(f"cluster id {cluster!r} is not 1 to 8 lower-case letters and digits")
    with _locked():
        _remove_interfaces(cluster)
        routes = parse_routes(_read_routes())
        taken = [to for to, _ in routes if to.prefixlen >= _SHORTEST_PREFIX]
        subnet = choose_subnet(taken, start=zlib.crc32(cluster.encode()))
        network = ClusterNetwork(cluster, str(subnet))
        with Rtnetlink() as host:
            mac = _mac(0x02, network.host_address)
            host.perform([netlink.new_bridge(network.bridge, mac)])
            index = host.index(network.bridge)
            host.perform([netlink.add_address(index, network.host_address, subnet.prefixlen)])
        apply_rules(host_rules(network.table, network.bridge, subnet, f"{_BRIDGES}*"))
        (_CONF / network.bridge / "forwarding").write_text("1")
        outside = next((interface for to, interface in routes if to == _EVERYWHERE), None)
        if outside is not None:
            _forward_from(outside)
    return network


def tear_down_network(network: ClusterNetwork) -> None:
    """Remove all of it. Idempotent; works from the value alone, also after a crash."""
    with _locked():
        _remove_interfaces(network.cluster)
        apply_rules(remove_rules(network.table))
        if not _interfaces(_BRIDGES):
            _forget_all()


def attach_node(network: ClusterNetwork, number: int, pid: int) -> None:
    """Give the network namespace of `pid` its uplink: up, with address and default route."""
    address, port = network.node_address(number), network.port(number)
    with Rtnetlink() as host, run_in_network_of(pid, Rtnetlink) as inside:
        veth = netlink.new_veth(port, _mac(0x06, address), UPLINK, _mac(0x02, address), pid)
        host.perform([veth])
        host.perform([netlink.set_master(host.index(port), host.index(network.bridge))])
        uplink = inside.index(UPLINK)
        inside.perform(
            [
                netlink.set_up(netlink.LOOPBACK_INDEX),
                netlink.set_up(uplink),
                netlink.add_address(uplink, address, network.network.prefixlen),
                netlink.add_route(uplink, _EVERYWHERE, via=network.host_address),
            ]
        )


def detach_node(network: ClusterNetwork, number: int) -> None:
    """Delete a node's uplink, if it is there."""
    _delete([network.port(number)])


def parse_routes(text: str) -> list[tuple[IPv4Network, str]]:
    """Destination and interface of each line of /proc/net/route, preferred ones first."""
    rows = [line.split() for line in text.splitlines()[1:]]
    rows.sort(key=lambda row: int(row[6]))
    return [(IPv4Network((_address(row[1]), str(_address(row[7])))), row[0]) for row in rows]


def _address(word: str) -> IPv4Address:
    """An address as /proc writes it: hexadecimal, in the byte order of x86 and Arm."""
    return IPv4Address(bytes.fromhex(word)[::-1])


def _read_routes() -> str:
    return Path("/proc/thread-self/net/route").read_text()


def _mac(first: int, address: IPv4Address) -> bytes:
    """A locally administered hardware address that belongs to `address`."""
    return bytes([first, 0x7A]) + address.packed


@contextmanager
def _locked() -> Iterator[None]:
    """One at a time on this machine: two clusters must not choose the same subnet."""
    with _lock():
        yield


def _lock() -> IO[str]:
    """The lock's file, locked. The last cluster to leave removes it: then it is made anew."""
    path = _RUN / "network.lock"
    while True:
        with suppress(FileExistsError):
            _RUN.mkdir(mode=0o755)
        with suppress(FileNotFoundError):
            file = path.open("w")
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
            file.close()


def _forget_all() -> None:
    """The last cluster has left."""
    _restore_forwarding()
    (_RUN / "network.lock").unlink()
    with suppress(OSError):  # it may be used for something else
        _RUN.rmdir()


def _interfaces(prefix: str) -> list[str]:
    return [name for _, name in socket.if_nameindex() if name.startswith(prefix)]


def _remove_interfaces(cluster: str) -> None:
    _delete([*_interfaces(f"{_PORTS}{cluster}-"), f"{_BRIDGES}{cluster}"])


def _delete(names: list[str]) -> None:
    with Rtnetlink() as host:
        host.perform([netlink.delete_link(name) for name in names], accept=(errno.ENODEV,))


def _forward_from(interface: str) -> None:
    switch, before = _CONF / interface / "forwarding", _RUN / "forwarding"
    value = switch.read_text().strip()
    if value == "0" and not before.exists():
        before.write_text(interface)
    if value == "0":
        switch.write_text("1")


def _restore_forwarding() -> None:
    before = _RUN / "forwarding"
    if before.exists():
        switch = _CONF / before.read_text() / "forwarding"
        if switch.exists():
            switch.write_text("0")
        before.unlink()
