"""The sockets of a network namespace, by inode, from the files of /proc/PID/net."""

from __future__ import annotations

import ipaddress
import re
import sys
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from tabane.k2i.procfs import decode

TCP_STATES = {
    1: "ESTABLISHED",
    2: "SYN_SENT",
    3: "SYN_RECV",
    4: "FIN_WAIT1",
    5: "FIN_WAIT2",
    6: "TIME_WAIT",
    7: "CLOSE",
    8: "CLOSE_WAIT",
    9: "LAST_ACK",
    10: "LISTEN",
    11: "CLOSING",
    12: "NEW_SYN_RECV",
}
UNIX_TYPES = {1: "STREAM", 2: "DGRAM", 5: "SEQPACKET"}
NETLINK = {
    0: "ROUTE",
    4: "SOCK_DIAG",
    9: "AUDIT",
    11: "CONNECTOR",
    12: "NETFILTER",
    15: "UEVENT",
    16: "GENERIC",
}
LISTENING = 0x10000
"""Among a unix socket's flags: it accepts connections."""


_UNIX_ROW = re.compile(
    r"^[0-9a-f]+: [0-9A-F]{8} [0-9A-F]{8} ([0-9A-F]{8}) ([0-9A-F]{4}) ([0-9A-F]{2}) +([0-9]+)"
    r"(?= |$)",
    re.MULTILINE,
)
"""Up to its path; the address is printed as zeros to who may not know it."""


class Endpoint(NamedTuple):
    """An address and port; both empty where a socket is bound or connected to none."""

    address: str = ""
    port: int = 0


class Socket(NamedTuple):
    """`family`: `IPv4`, `IPv6`, `unix`, `netlink` or `packet`. `state` as in netstat(8), if any."""

    family: str
    protocol: str
    local: Endpoint = Endpoint()
    peer: Endpoint = Endpoint()
    state: str = ""
    path: str = ""


def parse_endpoint(text: str) -> Endpoint:
    """`0100007F:1F90`: the address is in words of the machine's own byte order."""
    address, _, port = text.partition(":")
    raw = bytes.fromhex(address)
    if sys.byteorder == "little":
        raw = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
    ip = ipaddress.ip_address(raw)
    if ip.is_unspecified and not int(port, 16):
        return Endpoint()
    return Endpoint("*" if ip.is_unspecified else str(ip), int(port, 16))


def parse_inet(text: str, family: str, protocol: str) -> Iterator[tuple[int, Socket]]:
    """Of /proc/net/tcp, udp, raw and their likes for IPv6, whose first line is a heading."""
    for line in text.splitlines()[1:]:
        words = line.split()
        local, peer = parse_endpoint(words[1]), parse_endpoint(words[2])
        state = TCP_STATES.get(int(words[3], 16), "") if protocol == "TCP" else ""
        yield int(words[9]), Socket(family, protocol, local, peer, state)


def parse_unix(text: str) -> Iterator[tuple[int, Socket]]:
    """Of /proc/net/unix. A path is whatever stands behind the inode: blanks, and line breaks that
    the next socket does not follow, too."""
    _, _, rows = text.partition("\n")
    begun = [*_UNIX_ROW.finditer(rows)]
    for row, following in zip_longest(begun, begun[1:]):
        flags, kind, state, inode = row.groups()
        path = rows[row.end() : following.start() if following else len(rows)]
        called = "LISTEN" if int(flags, 16) & LISTENING else ""
        yield (
            int(inode),
            Socket(
                "unix",
                UNIX_TYPES.get(int(kind, 16), "unix"),
                state=called or ("CONNECTED" if state == "03" else ""),
                path=path.removesuffix("\n").removeprefix(" "),
            ),
        )


def parse_netlink(text: str) -> Iterator[tuple[int, Socket]]:
    for line in text.splitlines()[1:]:
        words = line.split()
        yield int(words[9]), Socket("netlink", NETLINK.get(int(words[1]), words[1]))


def parse_packet(text: str) -> Iterator[tuple[int, Socket]]:
    for line in text.splitlines()[1:]:
        words = line.split()
        yield int(words[8]), Socket("packet", words[3])


Parse = Callable[[str], Iterator[tuple[int, Socket]]]
_FILES: dict[str, Parse] = {
    "tcp": lambda text: parse_inet(text, "IPv4", "TCP"),
    "tcp6": lambda text: parse_inet(text, "IPv6", "TCP"),
    "udp": lambda text: parse_inet(text, "IPv4", "UDP"),
    "udp6": lambda text: parse_inet(text, "IPv6", "UDP"),
    "udplite": lambda text: parse_inet(text, "IPv4", "UDPLITE"),
    "udplite6": lambda text: parse_inet(text, "IPv6", "UDPLITE"),
    "raw": lambda text: parse_inet(text, "IPv4", "RAW"),
    "raw6": lambda text: parse_inet(text, "IPv6", "RAW"),
    "icmp": lambda text: parse_inet(text, "IPv4", "ICMP"),
    "icmp6": lambda text: parse_inet(text, "IPv6", "ICMP"),
    "unix": parse_unix,
    "netlink": parse_netlink,
    "packet": parse_packet,
}


def read_sockets(net: Path) -> dict[int, Socket]:
    """All sockets of the network namespace whose `/proc/PID/net` this is. What a kernel does not
    have is left out."""
    found: dict[int, Socket] = {}
    for name, parse in _FILES.items():
        try:
            text = decode((net / name).read_bytes())
        except OSError:
            continue
        found.update(parse(text))
    return found
