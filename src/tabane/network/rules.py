"""What instances may reach: the packet filter of a node, and of the machine under a local cluster.

The rules of a node are static, but for the set of apps' TCP ports. They match the links by name
(`inst*`) and the two halves of the instance network, so starting and stopping instances never
changes them. Every table is replaced in
one transaction, so there is no moment without it.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterable
from ipaddress import IPv4Network, collapse_addresses
from pathlib import Path

from tabane.errors import EngineError
from tabane.network import netlink
from tabane.network.addresses import EGRESS, GATEWAY, INSTANCES, LINK_PREFIX
from tabane.network.netlink import Rtnetlink

NODE_TABLE = "tabane_instances"
TCP_PORTS = "tcp_ports"
NEVER = (IPv4Network("127.0.0.0/8"), IPv4Network("169.254.0.0/16"), INSTANCES)
"""No instance reaches these through its node: loopback, link-local (where clouds tell their
secrets), each other."""


def node_rules(control: Iterable[IPv4Network], tcp: Iterable[int] = ()) -> str:
    """The table of a node. `control`: networks in which nodes and their control ports are; `tcp`:
    see `tcp_ports`."""
    links = f'"{LINK_PREFIX}*"'
    forbidden = ", ".join(map(str, collapse_addresses((*NEVER, *control))))
    return f"""\
table inet {NODE_TABLE}
delete table inet {NODE_TABLE}
table inet {NODE_TABLE} {{
    set {TCP_PORTS} {{ type inet_service; }}
    chain prerouting {{
        type filter hook prerouting priority raw; policy accept;
        iifname {links} meta nfproto ipv6 drop
        iifname {links} fib saddr . iif oif missing drop
        iifname != {links} iifname != "lo" ip daddr {INSTANCES} drop
    }}
    chain input {{
        type filter hook input priority filter; policy accept;
        iifname {links} ct state established,related accept
        iifname {links} ip daddr {GATEWAY} udp dport 53 accept
        iifname {links} ip daddr {GATEWAY} tcp dport {{ 53, 80 }} accept
        iifname {links} ip daddr {GATEWAY} tcp dport @{TCP_PORTS} accept
        iifname {links} ip daddr {GATEWAY} icmp type echo-request accept
        iifname {links} drop
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        oifname {links} ct state established,related accept
        oifname {links} drop
        iifname {links} ip daddr {{ {forbidden} }} drop
        iifname {links} ip saddr {EGRESS} accept
        iifname {links} drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {INSTANCES} oifname != "lo" oifname != {links} masquerade
    }}
}}
{tcp_ports(tcp)}"""


def tcp_ports(ports: Iterable[int]) -> str:
    """At these ports instances reach their node's gateways, too, and at no others: a change of the
    node's table."""
    elements = ", ".join(map(str, sorted(ports)))
    change = f"flush set inet {NODE_TABLE} {TCP_PORTS}\n"
    if elements:
        change += f"add element inet {NODE_TABLE} {TCP_PORTS} {{ {elements} }}\n"
    return change


def host_rules(table: str, bridge: str, subnet: IPv4Network, bridges: str) -> str:
    """The table of a machine for one local cluster: its nodes get out through the machine, but not
    into the other local clusters, whose bridges match `bridges`."""
    return f"""\
table inet {table}
delete table inet {table}
table inet {table} {{
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname "{bridge}" oifname != "{bridge}" oifname "{bridges}" drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {subnet} oifname != "{bridge}" masquerade
    }}
}}
"""


def remove_rules(table: str) -> str:
    """Commands that remove a table, if it is there."""
    return f"table inet {table}\ndelete table inet {table}\n"


def apply_rules(text: str) -> None:
    """Give `text` to nft in the calling thread's network namespace: all of it happens or nothing.

    Blocks for some milliseconds. Raises `EngineError` with what nft said.
    """
    argv = ("nft", "-f", "-")
    try:
        done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise EngineError("nft is not installed: install nftables", argv=argv) from error
    if done.returncode:
        problem = f"nft refused the rules: {done.stderr.strip()}"
        raise EngineError(problem, argv=argv, status=done.returncode, output=done.stderr)


async def prepare_node(control: Iterable[IPv4Network], tcp: Iterable[int] = ()) -> None:
    """Make this network namespace ready for a `NetworkPool`: the rules, the gateway's address on
    the loopback interface, forwarding. `tcp`: see `tcp_ports`. Idempotent."""
    await asyncio.to_thread(_prepare_node, node_rules(control, tcp))


def _prepare_node(rules: str) -> None:
    apply_rules(rules)
    with Rtnetlink() as node:
        node.perform(
            [
                netlink.set_up(netlink.LOOPBACK_INDEX),
                netlink.add_address(netlink.LOOPBACK_INDEX, GATEWAY, 32),
            ]
        )
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
