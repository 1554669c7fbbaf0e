"""Connections from the node, and whose process is at their other end.

Over a unix socket the kernel says who listens. Over TCP the socket that listens is looked up in the
kernel's table, and then who has it open: the oldest of them, for a server's workers inherit it. All
processes' descriptors are looked at for that, so it is done again only when that process has ended
or the socket is another.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from tabane.k2i.collectors.api import MAX_ANSWER_BYTES, Streams
from tabane.k2i.procfs import GONE, start_ticks
from tabane.security.identity import peer_principal

PORTS = {"http": 80, "redis": 6379}
LISTEN = "0A"
"""In /proc/net/tcp (TCP_LISTEN of tcp_states.h)."""


def target_of(url: str) -> tuple[str, int]:
    """Host and port of a URL."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or PORTS[parts.scheme]


class NodeDial:
    """One for each collector: it remembers who listened. See the module's text."""

    def __init__(self, procfs: Path = Path("/proc")) -> None:
        self._procfs = procfs
        self._inode = ""
        self._owner = (0, 0)
        """pid and start time in ticks."""

    async def connect(self, url: str) -> Streams:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            return await asyncio.open_unix_connection(parts.path, limit=MAX_ANSWER_BYTES)
        return await asyncio.open_connection(*target_of(url), limit=MAX_ANSWER_BYTES)

    async def owner(self, streams: Streams) -> int:
        sock: socket.socket = streams[1].get_extra_info("socket")
        if sock.family == socket.AF_UNIX:
            return peer_principal(sock).pid
        host, port = sock.getpeername()[:2]
        return await asyncio.to_thread(self._find, host, port)

    def _find(self, host: str, port: int) -> int:
        inode = find_inode(self._procfs, host, port)
        pid, ticks = self._owner
        if inode != self._inode or (pid and start_ticks(pid, self._procfs) != ticks):
            self._inode = inode
            self._owner = self._oldest(inode) if inode else (0, 0)
        return self._owner[0]

    def _oldest(self, inode: str) -> tuple[int, int]:
        """Pid and start time of the first process that had this socket, or zeros."""
        holders = [
            (ticks, pid)
            for pid in map(int, filter(str.isdigit, os.listdir(self._procfs)))  # noqa: PTH208
            if has_open(self._procfs / str(pid), f"socket:[{inode}]")
            and (ticks := start_ticks(pid, self._procfs))
        ]
        ticks, pid = min(holders, default=(0, 0))
        return pid, ticks


def has_open(process: Path, target: str) -> bool:
    """Whether the process of a directory of /proc has something open, as `socket:[123]`."""
    with suppress(*GONE):
        for descriptor in os.listdir(process / "fd"):  # noqa: PTH208
            with suppress(*GONE):
                if os.readlink(process / "fd" / descriptor) == target:  # noqa: PTH115
                    return True
    return False


def find_inode(procfs: Path, host: str, port: int) -> str:
    """Of the socket of this network namespace that listens at an address; empty when none does."""
    version = 6 if ":" in host else 4
    wanted = [_show(version, host, port), _show(version, "::" if version == 6 else "0.0.0.0", port)]
    names = ("tcp6",) if version == 6 else ("tcp", "tcp6")
    if version == 4:
        wanted.append(_show(6, "::", port))
    listening: dict[str, str] = {}
    for name in names:
        with suppress(*GONE):
            for line in (procfs / "thread-self" / "net" / name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTEN:
                    listening[fields[1]] = fields[9]
    return next((listening[address] for address in wanted if address in listening), "")


def _show(version: int, host: str, port: int) -> str:
    """As /proc writes it: hexadecimal, each four bytes in the machine's order."""
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    packed = socket.inet_pton(family, host.partition("%")[0])
    words = (int.from_bytes(packed[n : n + 4], sys.byteorder) for n in range(0, len(packed), 4))
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
