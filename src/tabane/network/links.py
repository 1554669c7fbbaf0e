"""One link: a parked process in fresh user and network namespaces, and a veth pair into them.

The pair is a routed wire, not a port of a bridge: the node's end has a host route to the one
address behind it, so the kernel itself knows which address may come from where. Neighbours are
permanent on both ends, IPv6 is off inside. All of it is kernel work that blocks for milliseconds
(a deletion for tens of them), so the pool calls these functions in threads.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from ipaddress import IPv4Network
from pathlib import Path
from shutil import which

from tabane.network import netlink
from tabane.network.addresses import (
    GATEWAY,
    INSTANCE_MAC,
    NODE_MAC,
    address_of,
    link_name,
    slot_of_link,
)
from tabane.network.netlink import Rtnetlink
from tabane.network.processes import end_process
from tabane.runtimes.api import Command, Link
from tabane.runtimes.process import start_ticks

INSIDE = "eth0"
IDS = 65536

_MARK = "TABANE_LINK"
PARKED = "tabane-netns"
"""What parked processes are called, also by the kernel, which goes by the file that they run."""
_PARK = f"""(
    command -v {PARKED} && exec {PARKED} infinity
    exec sleep infinity
) </dev/null >/dev/null 2>&1 & echo $!"""
"""The named one is not to be had below a directory that is its owner's alone: no capabilities."""
_GRAVE = 0x7ABA
"""Interface group of links that are to be deleted together."""
_EVERYWHERE = IPv4Network("0.0.0.0/0")
_SYSCTLS = {
    "ipv4/ip_unprivileged_port_start": "0",
    "ipv6/conf/all/disable_ipv6": "1",
    "ipv6/conf/default/disable_ipv6": "1",
}


def name_sleep(directory: Path) -> None:
    """Have in `directory` a `sleep` under the name of parked processes; unless that here is one of
    those that are many programs, and go by the name they are called by."""
    program = which("sleep") or ""
    link = directory / PARKED
    link.unlink(missing_ok=True)
    if Path(program).resolve().name == "sleep":
        link.symlink_to(program)


def park_command(pool: str, slot: int, directory: Path | None = None) -> Command:
    """What leaves a parked process behind and prints its pid; `directory` is that of `name_sleep`.

    The shell ends when the process exists; the spawner then adopts it. The namespaces have no id
    maps yet, so what runs there has no capabilities. Its environment names the pool, by which
    `find_parked` knows it again.
    """
    path = os.environ.get("PATH", os.defpath)
    return Command(
        key=f"link-{slot}",
        argv=("unshare", "--user", "--net", "--", "sh", "-c", _PARK),
        env={"PATH": f"{directory}:{path}" if directory else path, _MARK: pool},
    )


def connect(slot: int, pid: int, ticks: int) -> Link:
    """Lay the wire into the namespaces of a parked process, and configure both ends."""
    address, name = address_of(slot), link_name(slot)
    with Rtnetlink() as node, netlink.run_in_network_of(pid, _open_inside) as inside:
        node.perform([netlink.new_veth(name, NODE_MAC, INSIDE, INSTANCE_MAC, pid)])
        here, there = node.index(name), inside.index(INSIDE)
        node.perform(
            [
                netlink.add_route(here, IPv4Network(address), source=GATEWAY),
                netlink.add_neighbour(here, address, INSTANCE_MAC),
            ]
        )
        inside.perform(
            [
                netlink.set_up(netlink.LOOPBACK_INDEX),
                netlink.set_up(there),
                netlink.add_address(there, address, 32),
                netlink.add_route(there, IPv4Network(GATEWAY)),
                netlink.add_route(there, _EVERYWHERE, via=GATEWAY),
                netlink.add_neighbour(there, GATEWAY, NODE_MAC),
            ]
        )
    return Link(slot, str(address), str(GATEWAY), pid, ticks)


def _open_inside() -> Rtnetlink:
    for name, value in _SYSCTLS.items():
        path = Path("/proc/sys/net", name)
        if path.exists():
            path.write_text(value)
    return Rtnetlink()


def write_id_maps(process: int, id_base: int) -> None:
    """Give the parked process's user namespace the ids 0..65535 of an app, once and for good.

    `process` is an open /proc/PID directory, so that it cannot be another process's. Raises
    `FileNotFoundError` or `ProcessLookupError` when the parked process has ended.
    """
    line = f"0 {id_base} {IDS}".encode()
    for name in ("uid_map", "gid_map"):
        descriptor = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=process)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)


def remove(slots: Iterable[int], parked: Iterable[tuple[int, int]]) -> None:
    """Delete the wires of `slots` and end the `parked` processes (pid, start ticks). Idempotent."""
    requests = [netlink.set_group(link_name(slot), _GRAVE) for slot in slots]
    if requests:
        with Rtnetlink() as node:
            node.perform([*requests, netlink.delete_group(_GRAVE)], accept=(errno.ENODEV,))
    for pid, ticks in parked:
        end_process(pid, ticks)


def find_links() -> set[int]:
    """Slots whose wires exist in the network namespace of the calling thread."""
    slots = (slot_of_link(name) for _, name in socket.if_nameindex())
    return {slot for slot in slots if slot is not None}


def find_parked(pool: str) -> set[tuple[int, int]]:
    """(pid, start ticks) of each process that was parked for `pool`."""
    mark = f"{_MARK}={pool}".encode()
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _is_marked(path, mark)]
    return {(pid, ticks) for pid in pids if (ticks := start_ticks(pid))}


def _is_marked(process: Path, mark: bytes) -> bool:
    """Only root's processes are asked: an app's environment says what the app likes."""
    try:
        if process.stat().st_uid != 0:
            return False
        return mark in (process / "environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
