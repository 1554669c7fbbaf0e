"""What a container that is to be dumped has that no copy can have: pure, from texts of /proc."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import NamedTuple

from tabane.runtimes.api import SERVICES
from tabane.runtimes.bundle import MASKED_PATHS

DEV, USR = "/dev", "/usr"
SHOWN = (DEV, USR, SERVICES)
"""Mount points of what the node shows to an instance."""
LISTENS = "0A"
"""State in /proc/net/tcp."""
NANOSECONDS = 1_000_000_000


class Mount(NamedTuple):
    """As in mountinfo: what of the file system (`root`) is mounted where, and the file system's
    type."""

    root: str
    point: str
    kind: str


def parse_mounts(mountinfo: str) -> list[Mount]:
    found = []
    for line in mountinfo.splitlines():
        fields, _, file_system = line.partition(" - ")
        _, _, _, root, point, *_ = fields.split(" ")
        found.append(Mount(_unescape(root), _unescape(point), file_system.split(" ")[0]))
    return found


def _unescape(text: str) -> str:
    return text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n")


def find_external(mounts: list[Mount]) -> tuple[str, ...]:
    """The mount points of what is made anew for each instance, and of what an engine laid over
    what nobody shall see."""
    points = {*SHOWN, *MASKED_PATHS}
    return tuple(mount.point for mount in mounts if mount.point in points and not _is_made(mount))


def _is_made(mount: Mount) -> bool:
    """Whether CRIU mounts it by itself: of an image without /dev or the like, maybe."""
    return mount.kind in ("proc", "sysfs", "devpts")


def is_file(point: str, mounts: list[Mount]) -> bool:
    """Whether what masks it is a file (/dev/null) rather than a directory."""
    return any(mount.point == point and mount.root.endswith("/null") for mount in mounts)


def find_bound(tcp: str, udp: str) -> str:
    """The first IPv4 address and port, as `ADDRESS:PORT`, which a socket is bound to that a copy
    with another address could not bind; empty when there is none. `tcp`, `udp`: /proc/net's."""
    listening = (line for line in _lines(tcp) if line[3] == LISTENS)
    for line in (*listening, *_lines(udp)):
        address, port = line[1].split(":")
        host = IPv4Address(struct.pack("=I", int(address, 16)))
        if not host.is_unspecified and not host.is_loopback:
            return f"{host}:{int(port, 16)}"
    return ""


def _lines(table: str) -> Iterator[list[str]]:
    return (line.split() for line in table.splitlines()[1:])


def parse_offset_ns(offsets: str, clock: str) -> int:
    """A clock's offset in a time namespace, of the text of /proc/PID/timens_offsets."""
    for line in offsets.splitlines():
        name, seconds, nanoseconds = line.split()
        if name == clock:
            return int(seconds) * NANOSECONDS + int(nanoseconds)
    return 0
